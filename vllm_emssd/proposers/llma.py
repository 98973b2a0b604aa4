"""Drafts copied from the request's own text or its reference (LLMA, arXiv 2304.04487).

Where the last `check_length` tokens occurred before, what followed then is
proposed again. Among several occurrences the one whose preceding text agrees
longest is copied, the latest of equals. EMS-SD uses lengths 2 and 7.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.copier import NO_COPY, Copier, Copy
from vllm_emssd.proposers.copy_lengths import CopyLengths


class LlmaProposer:
    """Copies only.

    Args:
        copy_length: most tokens copied a step, >= 1.
        lengths: how much of each copy is verified.
    """

    def __init__(self, copier: Copier, copy_length: int, lengths: CopyLengths) -> None:
        self._copier = copier
        self._copy_length = copy_length
        self._lengths = lengths

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        return self.choose(batch, self.find(batch))

    def find(self, batch: DraftBatch) -> list[Copy]:
        """What each request may copy, `NO_COPY` for those in prefill."""
        self._copier.begin_step()
        copies = [NO_COPY] * batch.num_reqs
        most = np.minimum(batch.max_draft_tokens, self._copy_length)
        for i in np.flatnonzero(batch.is_sampling & (most > 0)).tolist():
            copies[i] = self._copier.find(
                batch.req_ids[i],
                batch.token_ids[i, : batch.num_tokens[i]],
                int(batch.num_prompt_tokens[i]),
                int(most[i]),
            )
        return copies

    def choose(self, batch: DraftBatch, copies: list[Copy]) -> list[list[int]]:
        """As much of each copy as is worth its rows: the request's drafts."""
        confidence = np.zeros((batch.num_reqs, self._copy_length))
        confidence += np.array([copy.acceptance for copy in copies])[:, None]
        made = np.array([len(copy.token_ids) for copy in copies], dtype=np.int64)
        nothing_missing = np.zeros(batch.num_reqs, dtype=np.int64)
        lens = self._lengths.choose(batch.step_info(made, nothing_missing), confidence)
        drafts = [copy.token_ids[:n] for copy, n in zip(copies, lens, strict=True)]
        for req_id, copy, tokens in zip(batch.req_ids, copies, drafts, strict=True):
            if tokens:
                self._copier.record_proposed(req_id, copy)
        return drafts

    def add_reference(self, req_id: str, token_ids: np.ndarray) -> None:
        self._copier.add_reference(req_id, token_ids)

    def record_verified(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        self._copier.observe(req_id, num_draft_tokens, num_accepted_tokens)
        self._lengths.observe(req_id, num_draft_tokens, num_accepted_tokens)

    def record_unused(self, req_id: str) -> None:
        """The target verified drafts that another proposer made: no copy of this
        request stays pending."""
        self._copier.observe(req_id, 0, 0)
        self._lengths.observe(req_id, 0, 0)

    def release(self, req_ids: Iterable[str]) -> None:
        req_ids = list(req_ids)
        self._copier.release(req_ids)
        for req_id in req_ids:
            self._lengths.release(req_id)
