"""Drafts from a small model, fed only tokens whose draft K/V is missing.

A step's first forward feeds, for every request, the known tokens from its draft
cursor on: after a rejection that is the one new token, after a full acceptance
also the last draft, which the drafter proposed but was never fed. Further forwards
feed one draft each, of the requests still drafting.
Paper: EMS-SD (arXiv 2405.07542), "unpad input tokens", applied to the drafter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from vllm_emssd.draft_cursor import DraftCursor
from vllm_emssd.draft_length import DraftLengthPolicy
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.ragged import RaggedRows, grant_rows


class Drafter(Protocol):
    """The draft model over paged K/V, as the engine integration offers it."""

    max_num_rows: int  # most rows of one forward
    max_model_len: int  # positions the draft model can take

    def forward(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> torch.Tensor:
        """Compute `rows`, writing their K/V, and draft after some of them.

        Args:
            token_ids: [num_rows] integers.
            sampled_rows: [num_sampled] int64, indices into the rows.
            draft_position: 0 for the first draft after the known tokens.

        Returns: [num_sampled] int64 draft token ids on the drafter's device.
        """
        ...


class DraftModelProposer:
    """Unpadded drafting with a draft model."""

    def __init__(
        self,
        drafter: Drafter,
        cursor: DraftCursor,
        policy: DraftLengthPolicy,
        counters: Counters,
    ) -> None:
        self._drafter = drafter
        self._cursor = cursor
        self._policy = policy
        self._counters = counters

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        draft_lens = self._policy.draft_lengths(batch.max_draft_tokens)
        draft_lens = np.where(batch.is_sampling, draft_lens, 0)
        starts, ends = self._missing_spans(batch, draft_lens)
        granted = grant_rows(ends - starts, self._drafter.max_num_rows)
        draft_lens[granted < ends - starts] = 0  # drafts once it has caught up

        fed = np.flatnonzero(granted)
        drafts: list[list[int]] = [[] for _ in batch.req_ids]
        if fed.size == 0:
            return drafts
        rows = RaggedRows.from_spans(fed, starts[fed], (starts + granted)[fed])
        drafting = np.flatnonzero(draft_lens)
        token_ids = self._draft(batch, rows, drafting, draft_lens)

        for i in fed:
            self._cursor.advance(batch.req_ids[i], int(starts[i] + granted[i]))
        for i, tokens in zip(drafting, token_ids, strict=True):
            drafts[i] = tokens[: draft_lens[i]]
            self._cursor.record_fed_drafts(batch.req_ids[i], len(drafts[i]) - 1)
        return drafts

    def release(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._cursor.release(req_id)

    def _missing_spans(
        self, batch: DraftBatch, draft_lens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions each request still has to feed; empty for who neither drafts nor
        is in prefill. Returns starts and ends, [num_reqs] int64 each."""
        starts = np.fromiter(
            map(self._cursor.draft_len, batch.req_ids), np.int64, batch.num_reqs
        )
        ends = np.where(batch.is_sampling, batch.num_tokens, batch.num_prefilled_tokens)
        ends = np.minimum(ends, self._drafter.max_model_len)
        idle = batch.is_sampling & (draft_lens == 0)
        return starts, np.where(idle, starts, np.maximum(starts, ends))

    def _draft(
        self,
        batch: DraftBatch,
        rows: RaggedRows,
        drafting: np.ndarray,
        draft_lens: np.ndarray,
    ) -> list[list[int]]:
        """Run the forwards. Returns [num_drafting][longest draft] token ids; those
        past a request's own length are meaningless.

        `drafting`: [num_drafting] batch rows, all of which are in `rows`.
        """
        known_ids = batch.token_ids[rows.row_req_indices, rows.positions]
        is_drafting = np.zeros(batch.num_reqs, dtype=bool)
        is_drafting[drafting] = True
        sampled_rows = rows.last_rows[is_drafting[rows.req_indices]]
        self._count_forward(batch, rows)
        tokens = self._drafter.forward(rows, known_ids, sampled_rows, 0)

        longest = int(draft_lens.max(initial=0))
        if longest == 0:
            return []
        drafted = torch.zeros(
            (len(drafting), longest), dtype=torch.int64, device=tokens.device
        )
        drafted[:, 0] = tokens
        active = np.arange(len(drafting))  # indices into `drafting`, only shrinks
        for position in range(1, longest):
            still = draft_lens[drafting[active]] > position
            if not still.all():
                active = active[still]
                tokens = tokens[torch.from_numpy(np.flatnonzero(still))]
            req_indices = drafting[active]
            ends = batch.num_tokens[req_indices] + position
            rows = RaggedRows.from_spans(req_indices, ends - 1, ends)
            self._count_forward(batch, rows)
            tokens = self._drafter.forward(rows, tokens, rows.last_rows, position)
            drafted[torch.from_numpy(active), position] = tokens
        return drafted.tolist()  # sync: the scheduler needs the drafts on the host

    def _count_forward(self, batch: DraftBatch, rows: RaggedRows) -> None:
        is_decode = rows.positions >= batch.num_prompt_tokens[rows.row_req_indices]
        self._counters.num_draft_forwards += 1
        self._counters.num_draft_rows += rows.num_rows
        self._counters.num_draft_rows_decode += int(is_decode.sum())
