"""Copies where that is likely right, drafts of a model elsewhere: chosen per request.

A copy costs the drafter nothing. A request that copies is not fed to it, so its draft
cursor stays behind and catches up when the request drafts again; the missed tokens are
charged to drafting. Which of the two a request does depends on its known tokens and on
how its earlier drafts fared, never on drafts not yet verified: copies are one-hot in
the rejection sampler, drafts are what they are with the draft model alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from vllm_emssd.draft_length import Copies
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.copier import (
    AcceptanceRecord,
    Copy,
    expected_accepted,
)
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.llma import LlmaProposer

DRAFT_MODEL, LLMA = "draft_model", "llma"  # as the options call them
_PRIOR_ACCEPTANCE = 0.7  # of a model's drafts, until some were verified
_PRIOR_TESTS = 4.0  # drafts that what is known of all requests is worth for one
_POOL_FORGET = 0.99


def no_drafts(batch: DraftBatch) -> list[list[int]]:
    return [[] for _ in batch.req_ids]


class DraftRecord:
    """How a model's drafts fare, of each request and of all: what to go by where no
    prices are known."""

    def __init__(self) -> None:
        self._pool = AcceptanceRecord()
        self._has_faded = False  # the pool, in this step
        self._requests: dict[str, AcceptanceRecord] = {}

    def begin_step(self) -> None:
        """All drafts of the step before have been observed."""
        self._has_faded = False

    def prefers(
        self,
        req_ids: Sequence[str],
        copies: list[Copy],
        num_drafts: np.ndarray,
        missing_rows: np.ndarray,
    ) -> np.ndarray:
        """Which requests gain more by their copy than by so many drafts. A draft costs
        little, but not nothing; missed text is charged over the steps to come.
        [num_reqs] bool"""
        cost = 0.02 * num_drafts + 0.001 * missing_rows
        drafted = self.gains(req_ids, num_drafts) - cost
        gains = np.array([copy.gain for copy in copies])
        has_copy = np.array([bool(copy.token_ids) for copy in copies], dtype=bool)
        return has_copy & (gains >= np.where(num_drafts > 0, drafted, 0.0))

    def gains(self, req_ids: Sequence[str], num_drafts: np.ndarray) -> np.ndarray:
        """How many of so many drafts are expected to be accepted. [num_reqs] float64"""
        return np.array(
            [
                expected_accepted(self._acceptance(req_id), n) if n else 0.0
                for req_id, n in zip(req_ids, num_drafts.tolist(), strict=True)
            ]
        )

    def _acceptance(self, req_id: str) -> float:
        pooled = self._pool.acceptance(_PRIOR_ACCEPTANCE)
        record = self._requests.get(req_id)
        return pooled if record is None else record.acceptance(pooled, _PRIOR_TESTS)

    def observe(self, req_id: str, num_drafts: int, num_accepted: int) -> None:
        if num_drafts:
            keep = 1.0 if self._has_faded else _POOL_FORGET
            self._pool.observe(num_drafts, num_accepted, keep)
            self._has_faded = True
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
        weighs_copies: the drafting policy itself weighs drafts against copies; else
            a record of how both fare decides.
    """

    def __init__(
        self,
        copying: LlmaProposer,
        drafting: DraftModelProposer,
        num_draft_tokens: int,
        weighs_copies: bool = False,
    ) -> None:
        self._copying = copying
        self._drafting = drafting
        self._num_draft_tokens = num_draft_tokens
        self._weighs_copies = weighs_copies
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
        self._record.begin_step()
        may_draft = self._drafting.max_draft_tokens(batch)
        may_draft = np.minimum(may_draft, self._num_draft_tokens)
        if self._only == DRAFT_MODEL:
            self._copied.difference_update(batch.req_ids)
            if self._drafting.skips_step(int(batch.is_sampling.sum())):
                return no_drafts(batch)
            return self._drafting.propose(
                dataclasses.replace(batch, max_draft_tokens=may_draft)
            )
        copies = self._copying.find(batch)
        copied = self._copying.choose(batch, copies)
        made = no_drafts(batch)
        if self._only is None:
            made = self._draft_beside(batch, copies, copied, may_draft)
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
        if self._drafting.skips_step(int(batch.is_sampling.sum())):
            return no_drafts(batch)
        num_copied = np.array(list(map(len, copied)), dtype=np.int64)
        gains = np.array(
            [
                expected_accepted(copy.acceptance, n)
                for copy, n in zip(copies, num_copied.tolist(), strict=True)
            ]
        )
        if not self._weighs_copies:
            missing = self._drafting.missing_rows(batch)
            copied_rather = self._record.prefers(
                batch.req_ids, copies, may_draft, missing
            )
            may_draft = np.where(copied_rather & (num_copied > 0), 0, may_draft)
        return self._drafting.propose(
            dataclasses.replace(
                batch, max_draft_tokens=may_draft, copies=Copies(num_copied, gains)
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
            self._drafting.record_unused(req_id)
        else:
            self._copying.record_unused(req_id)
            self._drafting.record_verified(req_id, *verified)
            self._record.observe(req_id, *verified)

    def release(self, req_ids: Iterable[str]) -> None:
        req_ids = list(req_ids)
        self._copying.release(req_ids)
        self._drafting.release(req_ids)
        self._copied.difference_update(req_ids)
        for req_id in req_ids:
            self._record.release(req_id)
