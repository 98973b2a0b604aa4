"""Copies where that is likely right, drafts of a model elsewhere: chosen per request.

A copy costs the drafter nothing. A request that copies is not fed to it, so its draft
cursor stays behind, and the missed tokens are fed when the request drafts again. Which
of the two a request does depends on its known tokens and on how earlier drafts fared,
never on drafts not yet verified: copies are one-hot in the rejection sampler, drafts
are what they are with the draft model alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from vllm_emssd.draft_length import Copies, DraftLengthPolicy
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.llma import (
    NO_COPY,
    AcceptanceRecord,
    Copy,
    LlmaProposer,
    expected_accepted,
)

DRAFT_MODEL, LLMA = "draft_model", "llma"  # as the options call them
_PRIOR_ACCEPTANCE = 0.7  # of a model's drafts, until some were verified
_FORGET = 0.99  # weight that older drafts keep, each step that has news,
_IDLE_FORGET = 0.98  # or in which copies promised more
_DRAFT_COST = 0.02  # in accepted tokens: a draft costs little, but not nothing;
_MISSING_ROW_COST = 0.001  # missed text is charged over the steps to come


class ModelDrafts:
    """How a model's drafts fared, those of all requests, and what that says of more."""

    def __init__(self) -> None:
        self.record = AcceptanceRecord()

    def lose_to(
        self, copies: Copies, num_drafts: np.ndarray, missing_rows: np.ndarray
    ) -> np.ndarray:
        """Which requests' copies promise at least as much as so many drafts, for which
        the drafter must be fed `missing_rows` before. All [num_reqs]."""
        gains = self.gains(num_drafts, missing_rows)
        loses = (copies.rows > 0) & (copies.gains >= gains)
        if (loses & (num_drafts > 0)).any():
            # So that drafts that did badly are tried again.
            self.record.fade(_IDLE_FORGET)
        return loses

    def gains(self, num_drafts: np.ndarray, missing_rows: np.ndarray) -> np.ndarray:
        """Accepted tokens to expect of so many drafts of each request, less what they
        cost. [num_reqs] float64"""
        acceptance = self.record.acceptance(_PRIOR_ACCEPTANCE)
        depth = np.arange(1, num_drafts.max(initial=0) + 1)
        by_number = np.concatenate([[0.0], (acceptance**depth).cumsum()])
        cost = _DRAFT_COST * num_drafts + _MISSING_ROW_COST * missing_rows
        return np.where(num_drafts > 0, by_number[num_drafts] - cost, 0.0)

    def observe_step(self, num_drafts: np.ndarray, num_accepted: np.ndarray) -> None:
        """Requests verified so many drafts, each >= 1, of the model. Both [num_reqs]"""
        if len(num_drafts):
            self.record.fade(_FORGET)
            self.record.accepted += float(num_accepted.sum())
            self.record.tested += float(np.minimum(num_accepted + 1, num_drafts).sum())


def no_drafts(batch: DraftBatch) -> list[list[int]]:
    return [[] for _ in batch.req_ids]


class MixedProposer:
    """For each request and step, either a copy or a model's drafts.

    Args:
        copying, drafting: the two proposers; each has its own policy.
        num_draft_tokens: most drafts the model makes for a request.
        weighs_copies: the drafting policy itself weighs drafts against copies; else
            what each is expected to bring decides.
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
        self._drafts = ModelDrafts()
        self._has_faded = False  # that record, in this step
        self.only: str | None = None  # `DRAFT_MODEL` or `LLMA` makes drafts alone
        self._copied: set[str] = set()  # requests whose drafts to verify are copies

    @property
    def policy(self) -> DraftLengthPolicy:
        """Of the model's drafts."""
        return self._drafting.policy

    @policy.setter
    def policy(self, policy: DraftLengthPolicy) -> None:
        self._drafting.policy = policy

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        self._has_faded = False
        copies, copied = [NO_COPY] * batch.num_reqs, no_drafts(batch)
        if self.only != DRAFT_MODEL:
            copies = self._copying.find(batch)
            copied = self._copying.choose(batch, copies)
        made = no_drafts(batch)
        if self.only != LLMA:
            made = self._draft_beside(batch, copies, copied)
            copied = [[] if m else c for m, c in zip(made, copied, strict=True)]
        self._note_copies(batch, copied)
        return [m or c for m, c in zip(made, copied, strict=True)]

    def _draft_beside(
        self, batch: DraftBatch, copies: list[Copy], copied: list[list[int]]
    ) -> list[list[int]]:
        """The model's drafts, of requests that gain more by them than by what would be
        copied."""
        if self._drafting.skips_step(int(batch.is_sampling.sum())):
            return no_drafts(batch)
        may_draft = self._drafting.max_draft_tokens(batch)
        may_draft = np.minimum(may_draft, self._num_draft_tokens)
        num_copied = np.array(list(map(len, copied)), dtype=np.int64)
        acceptance = [copy.acceptance for copy in copies]
        gains = np.array(list(map(expected_accepted, acceptance, num_copied.tolist())))
        copies_at_hand = Copies(num_copied, gains)
        if not self._weighs_copies:
            missing = self._drafting.missing_rows(batch)
            loses = self._drafts.lose_to(copies_at_hand, may_draft, missing)
            may_draft = np.where(loses, 0, may_draft)
        return self._drafting.propose(
            dataclasses.replace(
                batch, max_draft_tokens=may_draft, copies=copies_at_hand
            )
        )

    def _note_copies(self, batch: DraftBatch, copies: list[list[int]]) -> None:
        """Which requests' drafts are copies now."""
        self._copied.difference_update(batch.req_ids)
        self._copied.update(r for r, c in zip(batch.req_ids, copies, strict=True) if c)

    def add_reference(self, req_id: str, token_ids: np.ndarray) -> None:
        self._copying.add_reference(req_id, token_ids)

    def record_verified(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        """Each proposer is told what became of its own drafts. If they were the
        other's, it is told of 0 drafts, so that none of its own stay pending."""
        verified = (num_draft_tokens, num_accepted_tokens)
        if req_id in self._copied:
            self._copied.remove(req_id)
            self._copying.record_verified(req_id, *verified)
            self._drafting.record_verified(req_id, 0, 0)
        else:
            self._copying.record_verified(req_id, 0, 0)
            self._drafting.record_verified(req_id, *verified)
            if num_draft_tokens:
                keep = 1.0 if self._has_faded else _FORGET
                self._drafts.record.observe(*verified, keep)
                self._has_faded = True

    def release(self, req_ids: Iterable[str]) -> None:
        req_ids = list(req_ids)
        self._copying.release(req_ids)
        self._drafting.release(req_ids)
        self._copied.difference_update(req_ids)
