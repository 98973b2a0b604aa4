"""Draft K/V validity of an EAGLE head, and which hidden states are kept for it.

Hidden states that the head was not fed are kept, the newest `num_rows`, in the order in
which they were computed. All rows ever kept are numbered, and a step's rows go by the
number of its first: what is older than `num_kept - num_rows` is lost. The states of a
block of the KV cache serve all requests that share it. A request that lacks lost states
begins its text anew, behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_emssd.async_draft_cursor import AsyncDraftCursor

_NOTHING: int = np.iinfo(np.int64).max  # is kept


class AsyncHeadCursor(AsyncDraftCursor):
    """Arguments beside those of `AsyncDraftCursor`:

    num_rows: most rows kept.
    """

    def __init__(
        self, num_slots: int, num_blocks: int, *args: Any, num_rows: int, **kwargs: Any
    ) -> None:
        super().__init__(num_slots, num_blocks, *args, **kwargs)
        self.num_rows = num_rows
        self.num_kept = 0  # rows ever, those left out at the buffer's end among them
        self.firsts = np.zeros(num_slots, np.int64)  # where texts begin for the head
        # The lowest number among the states that each request lacks, and among those of
        # each block; -1 where not all of a block's were kept.
        self._since = np.full(num_slots, _NOTHING)
        self._block_since = np.full(num_blocks, -1)

    def vacate(self, slot: int) -> None:
        self.firsts[slot], self._since[slot] = 0, _NOTHING

    def _append(self, slot: int, block_ids: Sequence[int], num_hits: int) -> None:
        super()._append(slot, block_ids, num_hits)
        self._block_since[list(block_ids[num_hits:])] = -1

    # ------------------------------------------------------------ what is kept

    def has_states(self, slots: np.ndarray) -> np.ndarray:
        """Whether all that each request lacked at the end of the step before are here.
        [num_reqs] bool"""
        since = self._since[slots]
        return (self._oldest <= since) & (since < _NOTHING)

    def loses_states(self, slots: np.ndarray, num_rows: int) -> np.ndarray:
        """Whether some go when so many rows more are kept. [num_reqs] bool"""
        return self._since[slots] < self._oldest + num_rows

    @property
    def _oldest(self) -> int:
        return max(self.num_kept - self.num_rows, 0)

    def take_rows(self, num_rows: int) -> int:
        """Room for states that follow one another. The number of the first."""
        start = self.num_kept % self.num_rows
        if start + num_rows > self.num_rows:
            self.num_kept += self.num_rows - start
        self.num_kept += num_rows
        return self.num_kept - num_rows

    def keep(
        self, slots: np.ndarray, number: int, starts: np.ndarray, lens: np.ndarray
    ) -> None:
        """A step's states were kept, for requests that lack rows: those of `lens`
        positions from `starts` on. [num_reqs] each"""
        first, end = -(-starts // self._block_size), starts + lens
        end = -(-end // self._block_size)
        self._block_since[self._block_ids(slots, first, end)] = number
        # A request that is new may share blocks which the head was not fed.
        new = slots[(self._since[slots] == _NOTHING) & self._has_gap(slots)]
        self._since[slots] = np.minimum(self._since[slots], number)
        if len(new):
            first, end = self._draft_len[new], self._num_hits[new]
            shared = self._numbers(new, first, end).min(axis=1)
            self._since[new] = np.minimum(self._since[new], shared)

    def keep_nothing(self, slots: np.ndarray) -> None:
        """These requests lack nothing."""
        self._since[slots] = _NOTHING

    def _has_gap(self, slots: np.ndarray) -> np.ndarray:
        return self._draft_len[slots] < self._num_hits[slots]

    def _numbers(
        self, slots: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> np.ndarray:
        """The lowest number of each block that begins at a position from `starts` up
        to `ends`; `_NOTHING` for the other blocks. [num_reqs, blocks]"""
        begins = np.arange(0, ends.max(initial=1), self._block_size)
        numbers = self._block_since[self._blocks[slots, : len(begins)]]
        is_asked = (starts[:, None] <= begins) & (begins < ends[:, None])
        return np.where(is_asked, numbers, _NOTHING)

    # ------------------------------------------------------------ feeding them

    def feed_kept(
        self, slots: np.ndarray, num_rows: np.ndarray, is_all: np.ndarray
    ) -> None:
        """The head was fed `num_rows` of the rows that each request lacked; `is_all`:
        all of them, the step's own aside."""
        self.feed(slots, num_rows)
        since = np.where(is_all, _NOTHING, self._since[slots] + num_rows)  # at least
        self._since[slots] = since
        # What follows in the same block may not be kept.
        last = slots[is_all], (self._next(slots[is_all]) - 1) // self._block_size
        self._block_since[self._blocks[last]] = -1

    def restart(self, slots: np.ndarray, num_missing: np.ndarray) -> int:
        """Texts that lack lost states begin anew, at the first block from which on all
        states are here, once the text has come so far. Returns how many did.

        Args:
            slots: without drafts whose acceptance is to come.
            num_missing: [num_reqs] rows that each lacks before those of the step.
        """
        is_lost = self._since[slots] < self._oldest
        slots, num_missing = slots[is_lost], num_missing[is_lost]
        nexts = self._next(slots)
        ends = nexts + num_missing
        numbers = self._numbers(slots, np.zeros_like(ends), ends)
        columns = np.arange(numbers.shape[1])
        behind_lost = ((numbers < self._oldest) * (columns + 1)).max(axis=1)
        firsts = np.maximum(-(-nexts // self._block_size), behind_lost)
        numbers[columns < firsts[:, None]] = _NOTHING
        firsts *= self._block_size
        on = firsts <= ends
        self._since[slots[on]] = numbers[on].min(axis=1)
        on &= firsts > nexts  # else another has fed what was lost
        slots, firsts = slots[on], firsts[on]
        self._num_uncached_tokens[slots] -= firsts - nexts[on]
        self._draft_len[slots] = self.firsts[slots] = firsts
        return len(slots)

    def _next(self, slots: np.ndarray) -> np.ndarray:
        """The first row that each request lacks. [num_reqs] int64"""
        longest = self._num_tokens[slots] + self._max_pending[slots]
        return longest - self._num_uncached_tokens[slots]
