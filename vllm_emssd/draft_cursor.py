"""Which draft K/V is valid, per request and per physical block.

The *cursor* of a request is the number of its leading tokens whose draft K/V is
in the cache and right. It moves in two ways: when the drafter is fed known
tokens, and when drafts that the drafter was fed turn out to be accepted.

With prefix caching a request may start on blocks that others filled. The target
did fill them, the drafter perhaps not (it need not have run then). So validity is
also kept per physical block: set once the drafter has written all of a block's
known tokens, cleared when the block is allocated for new content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request that is new or resumed after preemption: all its blocks are new to it.

    The first `num_computed_tokens` tokens are a prefix-cache hit; the blocks that
    hold them keep their content, all others are freshly allocated.
    """

    req_id: str
    block_ids: Sequence[int]
    num_computed_tokens: int


@dataclass(slots=True)
class _RequestState:
    draft_len: int  # leading tokens with valid draft K/V
    block_ids: list[int] = field(default_factory=list)
    num_hit_blocks: int = 0  # leading blocks that it shares, or may share
    num_fed_drafts: int = 0  # of the drafts not yet verified
    first: int = 0  # tokens before it have no draft K/V, and are not attended to


class DraftCursor:
    """Draft K/V validity of all running requests and of all cached blocks.

    Args:
        num_blocks: physical blocks of the KV cache.
        block_size: tokens a block, as the scheduler allocates them.
        trust_cached_blocks: False where blocks can be filled by someone else than
            this worker's models (a KV connector): then no hit is ever trusted.
    """

    def __init__(
        self, num_blocks: int, block_size: int, trust_cached_blocks: bool = True
    ) -> None:
        self._block_size = block_size
        self._trust_cached_blocks = trust_cached_blocks
        self._block_is_valid = np.zeros(num_blocks, dtype=bool)
        self._requests: dict[str, _RequestState] = {}

    def update_blocks(
        self,
        admitted: Iterable[AdmittedRequest],
        extended: Iterable[tuple[str, Sequence[int]]],
    ) -> list[int]:
        """Take in one step's block allocations.

        Args:
            admitted: new and resumed requests.
            extended: request id and the block ids appended to it.

        All fresh blocks are cleared before any cursor is looked up, since a
        request may hit blocks that another was given in this very step.

        Returns: the fresh blocks, those of hits that are not trusted among them.
        """
        admitted, extended = list(admitted), list(extended)
        fresh: list[int] = []
        for request in admitted:
            fresh += request.block_ids[self._num_hit_blocks(request) :]
        for req_id, block_ids in extended:
            fresh += block_ids
            self._requests[req_id].block_ids.extend(block_ids)
        self._clear(fresh)
        for request in admitted:
            self._requests[request.req_id] = _RequestState(
                0, list(request.block_ids), self._num_hit_blocks(request)
            )
        return fresh

    def release(self, req_id: str) -> None:
        """Forget a finished request. Its full blocks stay valid until reallocated."""
        self._requests.pop(req_id, None)

    def draft_len(self, req_id: str) -> int:
        """Leading tokens of the request whose draft K/V is valid.

        Within a prefix-cache hit, blocks count that have been made valid by now.
        """
        state = self._requests[req_id]
        first, within = divmod(state.draft_len, self._block_size)
        if within == 0 and first < state.num_hit_blocks:
            hits = self._block_is_valid[state.block_ids[first : state.num_hit_blocks]]
            num_valid = len(hits) if hits.all() else int(hits.argmin())
            state.draft_len += num_valid * self._block_size
        return state.draft_len

    def waits_for_another(
        self, req_ids: Sequence[str], feeds: np.ndarray
    ) -> np.ndarray:
        """Which requests would write a block that an earlier one is about to write.

        Requests with a common prefix share its blocks, often from the step in which
        the first of them fills it. Shapes: [num_reqs] bool both.
        """
        waits = np.zeros(len(req_ids), dtype=bool)
        claimed: set[int] = set()
        for i in np.flatnonzero(feeds):
            state = self._requests[req_ids[i]]
            block = state.draft_len // self._block_size
            if block >= len(state.block_ids):
                continue
            waits[i] = state.block_ids[block] in claimed
            claimed.add(state.block_ids[block])
        return waits

    def advance(self, req_id: str, draft_len: int) -> None:
        """The drafter was fed the known tokens up to, not including, `draft_len`."""
        state = self._requests[req_id]
        assert draft_len >= state.draft_len
        first, end = state.draft_len // self._block_size, draft_len // self._block_size
        state.draft_len = draft_len
        if first < end:
            self._block_is_valid[state.block_ids[first:end]] = True

    def restart_at(self, req_id: str, position: int) -> None:
        """Go on at a block's first position: what lies between the cursor and there
        cannot be fed, so the drafter's text begins there."""
        state = self._requests[req_id]
        assert position % self._block_size == 0
        assert position >= state.draft_len
        state.draft_len = state.first = position

    def first(self, req_id: str) -> int:
        """The first position with draft K/V, a block's first: 0 unless restarted."""
        return self._requests[req_id].first

    def record_fed_drafts(self, req_id: str, num_fed_drafts: int) -> None:
        """The drafter was fed the first `num_fed_drafts` drafts it proposed.

        They stay pending, however many steps pass, until `record_verified`.
        """
        self._requests[req_id].num_fed_drafts = num_fed_drafts

    def record_verified(self, req_id: str, num_accepted_tokens: int) -> None:
        """The target accepted the first `num_accepted_tokens` of the pending drafts."""
        state = self._requests[req_id]
        num_valid = min(num_accepted_tokens, state.num_fed_drafts)
        state.num_fed_drafts = 0
        if num_valid:
            self.advance(req_id, state.draft_len + num_valid)

    def _num_hit_blocks(self, request: AdmittedRequest) -> int:
        trusts = self._trust_cached_blocks
        return request.num_computed_tokens // self._block_size if trusts else 0

    def _clear(self, block_ids: Sequence[int]) -> None:
        self._block_is_valid[block_ids] = False
