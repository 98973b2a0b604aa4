"""Rows of the target rounded up on a CPU, where that is cheap, or even quicker.

Row counts are not all alike: on a CPU with AMX a forward of 17 to 32 rows may take
longer than one of 40, in one process and not in the next. And oneDNN makes its kernels
for one row count each, when it first meets it (15 to 150 ms for 16 layers of hidden
size 1024); ragged batches have any row count. So with automatic lengths, whose prices
tell what a row more costs, rows of no request are computed along: where they cost next
to nothing or less, and up to a row count that has its kernels until this has cost as
much as making those of a nearer one (as one rents skis until they could have been
bought: at most twice what knowing the future would cost). Beyond the row counts timed
at the start, where prices are guesses, by a tile at most.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_emssd.draft_length import CostTable
from vllm_emssd.draft_length.cost import quickest_times

if TYPE_CHECKING:
    from vllm_emssd.integration.costs import StepCostMeter

_MULTIPLES = (8, 4)  # the first that is cheap enough
_FROM_ROWS = 16  # fewer are few row counts
_MOST_MORE = 0.02  # of the forward's price
_TILE = 16  # rows: more are not computed along, though they seemed quicker
_QUICKER = 0.95  # times as long: less may be noise of a slow minute


class RowPadding:
    """How many rows to compute for as many as are needed.

    Args:
        samples: (rows, ms) of forwards. The quickest of a row count stands for it, as
            in a cost table, which prices a slower one like the later that is quicker.
        preparing_ms: what the first forward of a row count takes more than others.
    """

    def __init__(
        self, samples: Iterable[tuple[int, float]] = (), preparing_ms: float = 0.0
    ) -> None:
        times = quickest_times(samples)
        self._timed = list(times)
        self._quickest = {rows: _quickest(rows, times) for rows in self._timed}
        self._prepared = list(times)  # row counts that have their kernels, rising
        self._preparing_ms = preparing_ms
        self._spent_ms: defaultdict[int, float] = defaultdict(float)  # on rows beyond

    def __str__(self) -> str:
        changed = {rows: q for rows, q in self._quickest.items() if rows != q}
        return ", ".join(f"{rows} as {q}" for rows, q in changed.items()) or "none"

    def rounded(self, num_rows: int, most: int, target: CostTable) -> int:
        """Rows to compute for `num_rows`, at most `most`.

        Args:
            target: what rows cost now.
        """
        if num_rows < 1:
            return num_rows
        above = bisect_left(self._timed, num_rows)
        if above < len(self._timed):
            timed = self._timed[above]
            quickest = self._quickest[timed]
            if timed != quickest <= most:
                return quickest
        wanted = _rounded_where_cheap(num_rows, most, target)
        return self._prepared_for(wanted, most, target)

    def _prepared_for(self, wanted: int, most: int, target: CostTable) -> int:
        """The next row count with kernels, or `wanted`, which has them from now on.
        Beyond those timed a price is a guess: none is borrowed there from far off."""
        last_timed = self._timed[-1] if self._timed else 0
        most = min(most, max(last_timed, wanted + _TILE))
        above = bisect_left(self._prepared, wanted)
        if above < len(self._prepared) and (rows := self._prepared[above]) <= most:
            self._spent_ms[wanted] += target.at(rows) - target.at(wanted)
            if self._spent_ms[wanted] <= self._preparing_ms:
                return rows
        insort(self._prepared, wanted)
        self._spent_ms.pop(wanted, None)
        return wanted


def _quickest(rows: int, times: dict[int, float]) -> int:
    """The row count to compute instead of `rows`."""
    if rows <= _FROM_ROWS:
        return rows
    others = [n for n in times if rows <= n <= rows + _TILE]
    quickest = min(others, key=lambda n: (times[n], n))
    return quickest if times[quickest] < _QUICKER * times[rows] else rows


def _rounded_where_cheap(num_rows: int, most: int, target: CostTable) -> int:
    if num_rows < _FROM_ROWS:
        return num_rows
    price = target.at(num_rows)
    for multiple in _MULTIPLES:
        rounded = -(-num_rows // multiple) * multiple
        if rounded <= most and target.at(rounded) <= (1 + _MOST_MORE) * price:
            return rounded
    return num_rows


class PaddedRowsMixin:
    """Goes in front of vLLM's CPU runner, which takes padded rows as those of a graph:
    they have no request and no K/V slot."""

    _step_costs: StepCostMeter | None
    _row_padding: RowPadding
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
        if self._rounds_rows and across_dp is None and batch.num_tokens == num_tokens:
            assert self._step_costs is not None
            target = self._step_costs.costs.target
            rounded = self._row_padding.rounded(num_tokens, self.max_num_tokens, target)
            batch = replace(batch, num_tokens=rounded)
        return mode, batch, should_ubatch, across_dp, stats

    @property
    def _rounds_rows(self) -> bool:
        """With prices and for a single rank. Not with LoRA, which maps rows one by one,
        and not where padding rows would be routed to experts."""
        return (
            self._step_costs is not None
            and self.parallel_config.world_size == 1
            and self.lora_config is None
            and not self.model_config.is_moe
        )
