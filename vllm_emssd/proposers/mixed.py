"""Copies where that is likely right, drafts of a model elsewhere: chosen per request.

A copy costs the drafter nothing. A request that copies is not fed to it, so its draft
cursor stays behind and catches up when the request drafts again; the missed tokens are
charged to drafting. Which of the two a request does depends on its known tokens and on
how its earlier drafts fared, never on drafts not yet verified: copies are one-hot in
the rejection sampler, drafts are what they are with the draft model alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.copier import AcceptanceRecord, Copy, expected_accepted
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.llma import LlmaProposer

DRAFT_MODEL, LLMA = "draft_model", "llma"  # as the options call them
_PRIOR_ACCEPTANCE = 0.7  # of a model's drafts, until some were verified
_PRIOR_TESTS = 4.0  # drafts that what is known of all requests is worth for one
_POOL_FORGET = 0.99

# (drafts to make, rows to feed before the first), [num_reqs] each -> the tokens that
# could be emitted in the time that takes, [num_reqs] float
DraftingCost = Callable[[np.ndarray, np.ndarray], np.ndarray]


def unmeasured_cost(num_drafts: np.ndarray, missing_rows: np.ndarray) -> np.ndarray:
    """Without prices: a draft costs little, but not nothing; missed text is charged
    over the steps to come."""
    return np.where(num_drafts > 0, 0.02 * num_drafts + 0.001 * missing_rows, 0.0)


def no_drafts(batch: DraftBatch) -> list[list[int]]:
    return [[] for _ in batch.req_ids]


class DraftRecord:
    """How a model's drafts fare, of each request and of all."""

    def __init__(self) -> None:
        self._pool = AcceptanceRecord()
        self._requests: dict[str, AcceptanceRecord] = {}

    def acceptance(self, req_id: str) -> float:
        pooled = self._pool.acceptance(_PRIOR_ACCEPTANCE)
        record = self._requests.get(req_id)
        return pooled if record is None else record.acceptance(pooled, _PRIOR_TESTS)

    def observe(self, req_id: str, num_drafts: int, num_accepted: int) -> None:
        if num_drafts:
            self._pool.observe(num_drafts, num_accepted, _POOL_FORGET)
            record = self._requests.setdefault(req_id, AcceptanceRecord())
            record.observe(num_drafts, num_accepted)

    def skip(self, req_id: str) -> None:
        """It copied: what is known of its drafts grows old."""
        if req_id in self._requests:
            self._requests[req_id].fade()

    def release(self, req_id: str) -> None:
        self._requests.pop(req_id, None)


class MixedProposer:
    """Per request and step, a copy or a model's drafts.

    Args:
        copying, drafting: the two proposers; each has its own policy.
        num_draft_tokens: most drafts the model makes for a request.
        drafting_cost: what drafting costs beyond copying as many tokens.
    """

    def __init__(
        self,
        copying: LlmaProposer,
        drafting: DraftModelProposer,
        num_draft_tokens: int,
        drafting_cost: DraftingCost = unmeasured_cost,
    ) -> None:
        self._copying = copying
        self._drafting = drafting
        self._num_draft_tokens = num_draft_tokens
        self._drafting_cost = drafting_cost
        self._record = DraftRecord()
        self._only: str | None = None
        self._copied: set[str] = set()  # requests whose drafts to verify are copies

    def use(self, only: str | None) -> None:
        """From now on one of the two alone makes drafts, or, with None, both.

        Raises ValueError for a name that is not `DRAFT_MODEL` or `LLMA`.
        """
        if only not in (DRAFT_MODEL, LLMA, None):
            raise ValueError(
                f'{only!r} makes no drafts here: give "{DRAFT_MODEL}", "{LLMA}", or '
                "None for both"
            )
        self._only = only

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        may_draft = self._drafting.max_draft_tokens(batch)
        may_draft = np.minimum(may_draft, self._num_draft_tokens)
        if self._only == DRAFT_MODEL:
            self._copied.difference_update(batch.req_ids)
            if self._drafting.rests(float(batch.is_sampling.sum())):
                return no_drafts(batch)
            return self._drafting.propose(
                dataclasses.replace(batch, max_draft_tokens=may_draft)
            )
        copies = self._copying.find(batch)
        copied = self._copying.choose(batch, copies)
        if self._only == LLMA:
            self._note_copies(batch, copied)
            return copied
        made = self._draft_beside(batch, copies, copied, may_draft)
        # Who would rather draft, and then does not since it does not pay, copies.
        copied = [[] if m else c for m, c in zip(made, copied, strict=True)]
        self._note_copies(batch, copied)
        return [m or c for m, c in zip(made, copied, strict=True)]

    def _draft_beside(
        self,
        batch: DraftBatch,
        copies: list[Copy],
        copied: list[list[int]],
        may_draft: np.ndarray,
    ) -> list[list[int]]:
        """The model's drafts, of requests that gain more by them than by what would be
        copied. `may_draft`: [num_reqs] most drafts of each."""
        gains = np.array(
            [
                expected_accepted(copy.acceptance, len(tokens))
                for copy, tokens in zip(copies, copied, strict=True)
            ]
        )
        if self._drafting.rests(float(batch.is_sampling.sum() + gains.sum())):
            return no_drafts(batch)
        prefers_copy = self._prefers_copy(batch, copies, may_draft)
        num_copied = np.where(prefers_copy, list(map(len, copied)), 0)
        return self._drafting.propose(
            dataclasses.replace(
                batch,
                max_draft_tokens=np.where(num_copied > 0, 0, may_draft),
                num_other_rows=int(num_copied.sum()),
                other_gains=np.where(num_copied > 0, gains, 0.0),
            )
        )

    def _note_copies(self, batch: DraftBatch, copies: list[list[int]]) -> None:
        """Whose drafts are copies now."""
        self._copied.difference_update(batch.req_ids)
        for req_id, tokens in zip(batch.req_ids, copies, strict=True):
            if tokens:
                self._copied.add(req_id)
                self._record.skip(req_id)

    def add_reference(self, req_id: str, token_ids: np.ndarray) -> None:
        self._copying.add_reference(req_id, token_ids)

    def record_verified(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        """Each proposer hears of its own drafts, and what the other's brought."""
        verified = (num_draft_tokens, num_accepted_tokens)
        if req_id in self._copied:
            self._copied.remove(req_id)
            self._copying.record_verified(req_id, *verified)
            self._drafting.record_others(req_id, *verified)
        else:
            self._copying.record_others(req_id, *verified)
            self._drafting.record_verified(req_id, *verified)
            self._record.observe(req_id, *verified)

    def release(self, req_ids: Iterable[str]) -> None:
        req_ids = list(req_ids)
        self._copying.release(req_ids)
        self._drafting.release(req_ids)
        self._copied.difference_update(req_ids)
        for req_id in req_ids:
            self._record.release(req_id)

    def _prefers_copy(
        self, batch: DraftBatch, copies: list[Copy], may_draft: np.ndarray
    ) -> np.ndarray:
        """Which requests gain more by their copy than by drafts. [num_reqs] bool"""
        cost = self._drafting_cost(may_draft, self._drafting.missing_rows(batch))
        prefers = np.zeros(batch.num_reqs, dtype=bool)
        for i, copy in enumerate(copies):
            if copy.token_ids:
                acceptance = self._record.acceptance(batch.req_ids[i])
                drafted = expected_accepted(acceptance, int(may_draft[i]))
                prefers[i] = copy.gain >= drafted - cost[i]
        return prefers
