"""Few row counts for the target's forwards on a CPU.

oneDNN makes its kernels for one row count each, when it first meets it (15 to 150 ms
for 16 layers of hidden size 1024), and ragged batches have any row count. So with
automatic lengths a forward computes the next of a few row counts, which all have their
kernels from the start; the policy fills the rows up with drafts where it has some left.
Steps without drafts have the rows, and the kernels, that they have without speculation.

More rows are sometimes quicker: on a CPU with AMX a forward of 17 to 32 rows may take
longer than one of 40, in one process and not in the next. There the larger one is
computed, and the cost table, which never falls, says what it takes. On other CPUs a
count that seems quicker was measured in a better moment, and would be taken for ever.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from vllm_emssd.draft_length.cost import quickest_times

# A forward of up to so many rows computes a multiple of this number: about one row in
# sixteen more at most, half of that on average.
_MULTIPLES = {16: 1, 64: 4, 256: 8, 512: 16}
_MULTIPLE_BEYOND = 32
_FROM_ROWS = 16  # fewer are not computed as more
_MAX_MORE = 16  # rows: no more are added, though they seemed quicker
_QUICKER = 0.95  # times as long, at most: a smaller difference may be noise


class RowPadding:
    """How many rows to compute for as many as are needed.

    Args:
        samples: (rows, ms) of forwards at some of `ROW_COUNTS`, of which the quickest
            time counts.
    """

    @classmethod
    def measured(cls, samples: Iterable[tuple[int, float]]) -> RowPadding:
        """By the samples on a CPU with AMX, else as without any."""
        return cls(samples if torch.cpu._is_amx_tile_supported() else ())

    def __init__(self, samples: Iterable[tuple[int, float]] = ()) -> None:
        times = quickest_times(samples)
        self._timed = list(times)
        self._quickest = {rows: _quickest(rows, times) for rows in self._timed}

    def padded(self, num_rows: int, most: int, to_one_of_few: bool = True) -> int:
        """Rows to compute for `num_rows`, at most `most`."""
        above = bisect_left(self._timed, num_rows)
        if 0 < num_rows <= most and above < len(self._timed):
            timed = self._timed[above]
            quickest = self._quickest[timed]
            if timed != quickest <= most:
                return quickest
        if not to_one_of_few:
            return num_rows
        return min(next_row_count(num_rows), max(num_rows, most))


def next_row_count(num_rows: int) -> int:
    number = next((m for n, m in _MULTIPLES.items() if num_rows <= n), _MULTIPLE_BEYOND)
    return -(-num_rows // number) * number


ROW_COUNTS = sorted(
    set(map(next_row_count, range(1, 513)))
)  # have kernels from the start


def _quickest(rows: int, times: dict[int, float]) -> int:
    """The row count to compute instead of `rows`."""
    if rows <= _FROM_ROWS:
        return rows
    others = [n for n in times if rows <= n <= rows + _MAX_MORE]
    quickest = min(others, key=lambda n: (times[n], n))
    return quickest if times[quickest] < _QUICKER * times[rows] else rows


class PaddedRowsMixin:
    """Goes in front of vLLM's CPU runner, which takes padded rows as those of a graph:
    they have no request and no K/V slot."""

    _row_padding: RowPadding | None  # with automatic lengths
    _has_drafts = True  # to verify in the step at hand: else rows are those of vLLM
    max_num_tokens: int
    parallel_config: Any
    lora_config: Any
    model_config: Any

    def _determine_batch_execution_and_padding(
        self, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        mode, batch, should_ubatch, across_dp, stats = (
            super()._determine_batch_execution_and_padding(  # type: ignore[misc]
                num_tokens, *args, **kwargs
            )
        )
        if across_dp is None and batch.num_tokens == num_tokens:
            num_rows = self.computed_rows(num_tokens, self._has_drafts)
            batch = replace(batch, num_tokens=num_rows)
        return mode, batch, should_ubatch, across_dp, stats

    def computed_rows(self, num_rows: int, has_drafts: bool = True) -> int:
        """Of a forward that needs `num_rows`."""
        # LoRA maps rows one by one, and padding rows would be routed to experts.
        if (
            self._row_padding is None
            or self.parallel_config.world_size > 1
            or self.lora_config is not None
            or self.model_config.is_moe
        ):
            return num_rows
        return self._row_padding.padded(num_rows, self.max_num_tokens, has_drafts)
