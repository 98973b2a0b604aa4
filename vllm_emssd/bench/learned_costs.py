"""A cost table from what a benchmark's rounds took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import numpy as np

from vllm_emssd.bench.costs import CostFile, ModelCosts, Point, table_of

MS = 1e3


def costs_of_result(result: Mapping[str, Any]) -> CostFile:
    """Forwards by the engine's own tables at the end of the last automatic round; what
    else a step takes, by the rounds of plain decoding and of all methods that draft.

    Raises ValueError where the result lacks plain or automatic rounds.
    """
    by_batch: dict[int, dict[str, list[dict[str, Any]]]] = {
        int(batch): methods for batch, methods in result["rounds"].items()
    }
    tables = [r["emssd_costs"] for r in _rounds(by_batch) if r.get("emssd_costs")]
    if not tables or any("plain" not in methods for methods in by_batch.values()):
        raise ValueError(
            "costs are learned from a result of 'vllm-emssd bench' that has the "
            "methods plain and auto in it"
        )
    target, draft = tables[-1]["target"], tables[-1]["draft"]
    fixed = _fixed(by_batch)
    more = [
        _besides_forwards(r, draft) - table_of(fixed).at(batch)
        for batch, methods in by_batch.items()
        for rounds in methods.values()
        for r in rounds
        if r["draft_forwards"]
    ]
    provenance, arguments = result["provenance"], result["arguments"]
    return CostFile(
        kind="measured",
        target=ModelCosts(model=arguments["model"], points=target),
        draft=ModelCosts(model=str(arguments["draft_model"]), points=draft),
        fixed=fixed,
        speculation_ms=max(0.0, round(median(more), 3)) if more else 0.0,
        provenance={
            name: str(provenance[name])
            for name in ("machine", "command", "commit", "vllm", "torch")
        },
    )


def _rounds(by_batch: Mapping[int, Any]) -> Iterator[dict[str, Any]]:
    for methods in by_batch.values():
        for rounds in methods.values():
            yield from rounds


def _fixed(by_batch: Mapping[int, Any]) -> list[Point]:
    """Milliseconds of a plain step besides the target's forward, by requests."""
    return [
        (batch, round(median(_besides_forwards(r, []) for r in methods["plain"]), 3))
        for batch, methods in sorted(by_batch.items())
    ]


def _besides_forwards(one: Mapping[str, Any], draft: list[Point]) -> float:
    """Of a round's average step, ms. The draft forwards at their price in the table,
    which is that of the whole forward, its inputs and its logits included."""
    ms = one["seconds"] * MS - one["target_ms"]
    if one["draft_forwards"]:
        rows = one["draft_rows"] / one["draft_forwards"]
        ms -= one["draft_forwards"] * float(table_of(draft).ms(np.array(rows)))
    return float(ms / one["num_steps"])
