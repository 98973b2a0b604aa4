"""How slow the machine was in each round of one engine.

A shared machine changes its speed by a factor of up to two, for minutes on end. Methods
that take turns in one engine run the same target, so its forwards are a clock: what
they took over what forwards of as many rows took in all rounds. The median over a
round, so that what one method alone has to pay (kernels made for a new row count) stays
its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_emssd.bench.round import Round

_GROUP = 24  # forwards of about as many rows, whose median is taken


def slowness(rounds: dict[str, list[Round]]) -> dict[str, list[float]]:
    """Of each round of each method, 1 if it is as quick as half of all."""
    forwards = [f for done in rounds.values() for r in done for f in r.target_forwards]
    rows, ms = np.array(sorted(forwards)).T
    groups = max(len(rows) // _GROUP, 1)
    typical_rows = [float(np.median(part)) for part in np.array_split(rows, groups)]
    typical_ms = [float(np.median(part)) for part in np.array_split(ms, groups)]

    def of(target_forwards: Sequence[tuple[int, float]]) -> float:
        rows, ms = np.array(target_forwards).T
        return float(np.median(ms / np.interp(rows, typical_rows, typical_ms)))

    return {
        name: [of(r.target_forwards) for r in done] for name, done in rounds.items()
    }
