"""Draft K/V validity of all requests at once, for a host that learns acceptance late.

On a GPU the number of accepted drafts is on the device, and a host that waits for it
leaves the device idle. How many rows the drafter lacks can be bounded without it: of
the drafts verified, those that the drafter was fed need no row, however many are
accepted; one at most was not. So `num_uncached_tokens` counts from the end of the text,
which the device knows: two at most for a request that drafted before. Feeding one token
again writes the same K/V. Of drafts that another proposer made none was fed: until
their acceptance is known, all of them count as uncached.

Any number of steps may run before one's acceptance is known. What each step left is
kept in an `UnverifiedStep` until then, and recorded as if it had been known at once.
Requests are told by their *slot*, the runner's row for them, so that a step is a few
array operations, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_emssd.draft_cursor import AdmittedRequest


@dataclass(slots=True)
class UnverifiedStep:
    """Requests in a step whose acceptance is to come. All are [num_reqs]."""

    slots: np.ndarray  # int64
    is_late: np.ndarray  # bool: what it did is recorded when its acceptance is known
    num_drafts: np.ndarray  # int64: to be verified
    num_fed_drafts: np.ndarray  # int64: of the drafts verified
    num_uncached_tokens: np.ndarray  # int64: when the step was over


class AsyncDraftCursor:
    """Draft K/V validity by slot and, for prefix caching, by physical block.

    A step goes: `begin` with its requests; `feed` and `draft` with what is fed; `end`.
    Once its acceptance is known, in the order of the steps: `record_acceptance`, which
    settles the step.

    Args:
        num_slots: requests at once.
        num_blocks: physical blocks of the KV cache.
        block_size: tokens a block, as the scheduler allocates them.
        max_blocks: of a request.
        trust_cached_blocks: as `DraftCursor` has it.
    """

    def __init__(
        self,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        max_blocks: int,
        trust_cached_blocks: bool = True,
    ) -> None:
        self._block_size = block_size
        self._trust_cached_blocks = trust_cached_blocks
        self._block_is_valid = np.zeros(num_blocks, dtype=bool)
        self._blocks = np.zeros((num_slots, max_blocks), dtype=np.int32)
        (
            self._num_blocks,  # of those above
            self._num_hits,  # leading tokens in blocks that the request may share
            self._draft_len,  # leading tokens with valid draft K/V
            self._num_tokens,  # known by the steps that are settled
            self._num_pending,  # steps to be settled,
            self._max_pending,  # and what they add to the tokens known at most
            self._num_uncached_tokens,  # known or pending, without draft K/V
            self._num_fed_drafts,  # of the drafts made last
        ) = self._state = np.zeros((8, num_slots), dtype=np.int64)

    # ------------------------------------------------------------ requests and blocks

    def update_blocks(
        self,
        admitted: Iterable[tuple[int, int, AdmittedRequest]],
        extended: Iterable[tuple[int, Sequence[int]]],
    ) -> None:
        """Take in one step's block allocations.

        Args:
            admitted: slot, known tokens, and new or resumed request.
            extended: slot and the block ids appended to it.

        All fresh blocks are cleared before any request looks for valid ones, since it
        may hit blocks that another was given in this very step.
        """
        for slot, block_ids in extended:
            self._append(slot, block_ids, num_hits=0)
        for slot, num_tokens, request in admitted:
            self._state[:, slot] = 0
            self._num_tokens[slot] = self._num_uncached_tokens[slot] = num_tokens
            num_hits = request.num_computed_tokens // self._block_size
            self._num_hits[slot] = num_hits * self._block_size
            self._append(slot, request.block_ids, num_hits)

    def _append(self, slot: int, block_ids: Sequence[int], num_hits: int) -> None:
        """All but the first `num_hits` get new content."""
        self._block_is_valid[list(block_ids[num_hits:])] = False
        start = self._num_blocks[slot]
        end = self._num_blocks[slot] = start + len(block_ids)
        self._blocks[slot, start:end] = block_ids

    # ------------------------------------------------------------ a step

    def begin(
        self, slots: np.ndarray, is_sampling: np.ndarray, num_drafts: np.ndarray
    ) -> UnverifiedStep:
        """Each request that samples knows one token more, and some or all of the drafts
        that it verifies. All [num_reqs]."""
        num_fed = self._num_fed_drafts[slots]
        num_drafts = np.where(is_sampling, num_drafts, 0)
        unfed = np.maximum(num_drafts - num_fed, 0)
        self._num_uncached_tokens[slots] += np.where(is_sampling, 1 + unfed, 0)
        self._num_fed_drafts[slots] = 0
        is_late = (num_drafts > 0) | (self._num_pending[slots] > 0)
        self._num_pending[slots] += is_late
        self._max_pending[slots] += is_late * (1 + num_drafts)
        # Nothing is uncertain of the others, which may count on what it feeds now.
        self._num_tokens[slots] += is_sampling & ~is_late
        return UnverifiedStep(slots, is_late, num_drafts, num_fed, num_fed)

    def num_uncached_tokens(self, slots: np.ndarray) -> np.ndarray:
        """Tokens from the end of each request's text back to its first without draft
        K/V, or at most one more. [num_reqs] int64

        In a prefix-cache hit, blocks count that have been made valid by now."""
        if self._trust_cached_blocks:
            # Of what is settled alone the leading tokens are known.
            is_hit = self._draft_len[slots] < self._num_hits[slots]
            self._skip_valid_blocks(slots[is_hit & (self._num_pending[slots] == 0)])
        return self._num_uncached_tokens[slots]

    def _skip_valid_blocks(self, slots: np.ndarray) -> None:
        """Of requests whose next block is shared."""
        starts = self._draft_len[slots]
        index, within = np.divmod(starts, self._block_size)
        is_next = self._block_is_valid[self._blocks[slots, index]] & (within == 0)
        if not is_next.any():
            return
        slots, starts = slots[is_next], starts[is_next]
        begins = np.arange(0, self._num_hits[slots].max(), self._block_size)
        is_valid = self._block_is_valid[self._blocks[slots, : len(begins)]]
        is_valid |= begins < starts[:, None]
        is_valid &= begins < self._num_hits[slots][:, None]
        num_valid = np.logical_and.accumulate(is_valid, axis=1).sum(axis=1)
        self._draft_len[slots] = num_valid * self._block_size
        self._num_uncached_tokens[slots] -= self._draft_len[slots] - starts

    def awaits_drafts(self, step: UnverifiedStep) -> np.ndarray:
        """Which requests verified drafts in an earlier step that is not settled, so
        that they may lack less than is known. [num_reqs] bool"""
        most, steps = self._max_pending[step.slots], self._num_pending[step.slots]
        return most - steps > step.num_drafts

    def waits_for_another(self, slots: np.ndarray, feeds: np.ndarray) -> np.ndarray:
        """Which requests would begin in a block in which an earlier one is about to
        begin: those with a common prefix share its blocks, often from the step in which
        the first of them fills it. [num_reqs] bool both"""
        waits = feeds.copy()
        slots = slots[feeds]
        index = self._draft_len[slots] // self._block_size
        blocks = self._blocks[slots, np.minimum(index, self._blocks.shape[1] - 1)]
        # A block that is not allocated yet is shared with no other request.
        blocks = np.where(index < self._num_blocks[slots], blocks, -1 - slots)
        first = np.unique(blocks, return_index=True)[1]
        waits[np.flatnonzero(feeds)[first]] = False
        return waits

    def feed(self, slots: np.ndarray, num_rows: np.ndarray) -> None:
        """The drafter was fed the first tokens that each request lacked."""
        self._num_uncached_tokens[slots] -= num_rows

    def draft(self, slots: np.ndarray, num_fed_drafts: np.ndarray) -> None:
        """It was fed all known tokens, and the first of the drafts it made."""
        self._num_uncached_tokens[slots] = 0
        self._num_fed_drafts[slots] = num_fed_drafts

    def end(self, step: UnverifiedStep) -> None:
        """All that the step fed has been told."""
        step.num_uncached_tokens = self._num_uncached_tokens[step.slots]
        now = ~step.is_late
        slots = step.slots[now]
        self._advance(slots, self._num_tokens[slots] - step.num_uncached_tokens[now])

    def record_acceptance(
        self, step: UnverifiedStep, num_accepted: np.ndarray, is_running: np.ndarray
    ) -> None:
        """What the oldest step that is not settled accepted. [num_reqs] integers

        `is_running`: [num_reqs] bool, False for a request that has left its slot since,
        whose blocks may be another's. Its full blocks stay valid until reallocated.
        """
        on = step.is_late & is_running
        slots, accepted = step.slots[on], num_accepted[on]
        self._num_pending[slots] -= 1
        self._max_pending[slots] -= 1 + step.num_drafts[on]
        self._num_tokens[slots] += 1 + accepted
        fed = self._draft_len[slots] + np.minimum(accepted, step.num_fed_drafts[on])
        known = self._num_tokens[slots] - step.num_uncached_tokens[on]
        self._advance(slots, np.maximum(fed, known))
        longest = self._num_tokens[slots] + self._max_pending[slots]
        self._num_uncached_tokens[slots] = np.minimum(
            self._num_uncached_tokens[slots], longest - self._draft_len[slots]
        )

    def _advance(self, slots: np.ndarray, draft_lens: np.ndarray) -> None:
        """The leading tokens have valid draft K/V: so have the blocks full of them."""
        before = self._draft_len[slots]
        draft_lens = np.maximum(draft_lens, before)
        self._draft_len[slots] = draft_lens
        first, end = before // self._block_size, draft_lens // self._block_size
        if (end > first).any():
            self._block_is_valid[self._block_ids(slots, first, end)] = True

    def _block_ids(
        self, slots: np.ndarray, first: np.ndarray, end: np.ndarray
    ) -> np.ndarray:
        """Of the blocks of each request from `first` up to `end`, one after the other.
        [total] int32"""
        lens = np.maximum(end - first, 0)
        within = np.arange(lens.sum()) - np.repeat(lens.cumsum() - lens, lens)
        return self._blocks[np.repeat(slots, lens), np.repeat(first, lens) + within]
