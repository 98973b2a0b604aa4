"""What the plugin counts, from the start of the engine.

All are exact except `num_padded_*`: those rows were never computed, so they are derived
from the steps of this engine and from how a padded batch is made up.

Counters never hold text or token ids. `SharedCounters` is the same numbers in a
small file that the API server reads when `/metrics` is scraped, so that counting
costs a step nothing but a few additions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np


def _counter(text: str) -> int:
    return field(default=0, metadata={"help": text})


@dataclass(slots=True)
class Counters:
    """One engine rank's counts since start. Ranks of one engine count alike."""

    num_steps: int = _counter("Target forwards.")
    num_request_steps: int = _counter("Pairs of a request and a step it sampled in.")
    num_draft_forwards: int = _counter("Draft model forwards.")
    num_draft_rows: int = _counter("Rows fed to the draft model, prompts included.")
    num_draft_rows_decode: int = _counter(
        "Rows fed to the draft model at positions after the prompt."
    )
    num_padded_draft_rows: int = _counter(
        "Rows that a padded drafter would have been fed: all scheduled tokens, at "
        "least K+1 a decoding request, and one more, then one a request and draft."
    )
    num_padded_draft_rows_decode: int = _counter(
        "The part of num_padded_draft_rows at positions after the prompt."
    )
    num_draft_tokens: int = _counter("Draft tokens verified by the target.")
    num_accepted_tokens: int = _counter("Draft tokens accepted by the target.")
    num_verify_rows: int = _counter(
        "Rows the target computed for requests that sampled, prompts excluded."
    )
    num_padded_verify_rows: int = _counter(
        "The same if every decoding request verified the step's longest draft."
    )
    num_emitted_tokens: int = _counter("Tokens sampled, before stop truncation.")
    num_draft_restarts: int = _counter(
        "Times that an EAGLE head began a request's text anew, as hidden states of "
        "tokens before were not kept."
    )
    num_failed_proposals: int = _counter(
        "Times that the proposer raised and a step went on without its drafts."
    )

    def as_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def count_draft_forward(self, num_rows: int, num_decode: int) -> None:
        """`num_decode`: of the rows, those at positions after the prompt."""
        self.num_draft_forwards += 1
        self.num_draft_rows += num_rows
        self.num_draft_rows_decode += num_decode

    def reset(self) -> None:
        """Count from zero again."""
        for f in fields(self):
            setattr(self, f.name, 0)


COUNTER_NAMES: tuple[str, ...] = tuple(f.name for f in fields(Counters))
COUNTER_HELP: dict[str, str] = {f.name: f.metadata["help"] for f in fields(Counters)}


class SharedCounters:
    """Publishes one engine's counters in `directory` for the API server to read."""

    def __init__(self, directory: Path, engine_index: int) -> None:
        self._values = np.memmap(
            directory / f"{engine_index}.counters",
            dtype=np.int64,
            mode="w+",
            shape=(len(COUNTER_NAMES),),
        ).view(np.ndarray)  # memmaps are slower to write to

    def publish(self, counters: Counters) -> None:
        self._values[:] = [getattr(counters, name) for name in COUNTER_NAMES]


def read_shared_counters(directory: Path) -> Iterator[tuple[int, dict[str, int]]]:
    """Engine index and counts of every engine that publishes in `directory`."""
    for path in sorted(directory.glob("*.counters")):
        values = np.fromfile(path, dtype=np.int64)
        if len(values) == len(COUNTER_NAMES):
            counts = dict(zip(COUNTER_NAMES, values.tolist(), strict=True))
            yield int(path.stem), counts
