"""Drafts from a small model, fed only tokens whose draft K/V is missing.

A step's first forward feeds, for every request, the known tokens from its draft
cursor on: after a rejection that is the one new token, after a full acceptance
also the last draft, which the drafter proposed but was never fed. Further forwards
feed one draft each, of the requests still drafting.
Paper: EMS-SD (arXiv 2405.07542), "unpad input tokens", applied to the drafter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import numpy as np
import torch

from vllm_emssd.draft_cursor import DraftCursor
from vllm_emssd.draft_length import DraftLengthPolicy
from vllm_emssd.feeding import plan_feeding
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.ragged import RaggedRows


class Drafter(Protocol):
    """The draft model over paged K/V, as the engine integration offers it."""

    max_num_rows: int  # most rows of one forward
    max_model_len: int  # positions the draft model can take
    returns_confidence: bool  # set before a step's forwards

    def forward(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        """Compute `rows`, writing their K/V, and draft after some of them.

        Args:
            token_ids: [num_rows] integers.
            sampled_rows: [num_sampled] int64, indices into the rows.
            draft_position: 0 for the first draft after the known tokens.

        Returns: [num_sampled] int64 draft token ids on the drafter's device; and, where
            it `returns_confidence`, the highest probability at each, float.
        """
        ...


class DraftModelProposer:
    """Unpadded drafting with a draft model.

    Args:
        policy: may be replaced between two steps.
        check_agreement: is shown each decision before it is acted on; raises where
            another rank decided differently.
        feeds_every_prompt: feed each prompt in the step that computes it, even of
            requests that want no drafts: a KV connector looks for that K/V.
    """

    _token_offset = 0  # from a row's position to that of the token it takes
    _keeps_fed_drafts = True  # once accepted, their K/V is that of their tokens

    def __init__(
        self,
        drafter: Drafter,
        cursor: DraftCursor,
        policy: DraftLengthPolicy,
        counters: Counters,
        check_agreement: Callable[[np.ndarray], None] | None = None,
        feeds_every_prompt: bool = False,
    ) -> None:
        self.policy = policy
        self._drafter = drafter
        self._cursor = cursor
        self._counters = counters
        self._check_agreement = check_agreement
        self._feeds_every_prompt = feeds_every_prompt

    def skips_step(self, num_sampling: int) -> bool:
        """Whether no request drafts in this step, known without a batch. Asked at most
        once a step, before `propose`, which must not be called then.

        `num_sampling`: requests that got a token.
        """
        if self._feeds_every_prompt:
            return False
        skips = self.policy.skips_step(num_sampling)
        if skips:  # ranks that do not skip compare their plan with this
            self._agree(np.array([num_sampling]))
        return skips

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        starts, ends = self._missing_spans(batch)
        step = batch.step_info(batch.max_draft_tokens, ends - starts)
        prompt_rows = None
        if self._feeds_every_prompt:
            rows_to_prefilled = np.minimum(ends, batch.num_prefilled_tokens) - starts
            prompt_rows = np.where(batch.computes_prompt, rows_to_prefilled, 0)
        num_rows, draft_lens = plan_feeding(
            step,
            self.policy,
            batch.max_draft_tokens > 0,
            partial(self._cursor.waits_for_another, batch.req_ids),
            self._drafter.max_num_rows,
            prompt_rows=prompt_rows,
        )
        self._drafter.returns_confidence = self.policy.needs_confidence
        self._agree(draft_lens, num_rows)
        fed = np.flatnonzero(num_rows)
        if fed.size == 0:
            return [[] for _ in batch.req_ids]
        self._start_feeding(batch, fed, starts)
        ends = starts + num_rows
        rows = RaggedRows.from_spans(fed, starts[fed], ends[fed])
        made = self._draft(batch, rows, draft_lens)
        num_made = np.zeros(batch.num_reqs, dtype=np.int64)
        for requests, _ in made:
            num_made[requests] += 1
        for i in fed:
            self._cursor.advance(batch.req_ids[i], int(ends[i]))
            if self._keeps_fed_drafts:
                num_fed_drafts = max(int(num_made[i]) - 1, 0)
                self._cursor.record_fed_drafts(batch.req_ids[i], num_fed_drafts)
        return _on_host(made, self.policy.trim(num_made))

    def record_verified(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        self._cursor.record_verified(req_id, num_accepted_tokens)
        self.policy.observe(req_id, num_draft_tokens, num_accepted_tokens)

    def release(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._cursor.release(req_id)
            self.policy.release(req_id)

    def max_draft_tokens(self, batch: DraftBatch) -> np.ndarray:
        """Most drafts of each request that the drafter's length allows. [num_reqs]"""
        room = self._drafter.max_model_len - batch.num_tokens + 1
        most: np.ndarray = np.clip(room, 0, batch.max_draft_tokens)
        return most

    def missing_rows(self, batch: DraftBatch) -> np.ndarray:
        """Known tokens of each request without draft K/V. [num_reqs] int64"""
        starts, ends = self._missing_spans(batch)
        return ends - starts

    def _missing_spans(self, batch: DraftBatch) -> tuple[np.ndarray, np.ndarray]:
        """Known tokens without draft K/V: starts and ends, [num_reqs] int64."""
        starts = np.fromiter(
            map(self._cursor.draft_len, batch.req_ids), np.int64, batch.num_reqs
        )
        ends = np.where(batch.is_sampling, batch.num_tokens, batch.num_prefilled_tokens)
        ends = np.minimum(ends, self._drafter.max_model_len)
        return starts, np.maximum(starts, ends)

    def _start_feeding(
        self, batch: DraftBatch, fed: np.ndarray, starts: np.ndarray
    ) -> None:
        """Requests `fed`, batch rows, are about to be fed from `starts` [num_reqs]."""

    def _draft(
        self, batch: DraftBatch, rows: RaggedRows, draft_lens: np.ndarray
    ) -> list[tuple[np.ndarray, torch.Tensor]]:
        """Run the forwards. Returns the batch rows and the drafts of each; no request
        makes more than its `draft_lens` [num_reqs]; those that draft are in `rows`."""
        at = rows.positions + self._token_offset
        known_ids = batch.token_ids[rows.row_req_indices, at]
        drafting = rows.req_indices[draft_lens[rows.req_indices] > 0]
        sampled_rows = rows.last_rows[draft_lens[rows.req_indices] > 0]
        is_decode = rows.positions >= batch.num_prompt_tokens[rows.row_req_indices]
        self._counters.count_draft_forward(rows.num_rows, int(is_decode.sum()))
        tokens, confidence = self._drafter.forward(rows, known_ids, sampled_rows, 0)
        if drafting.size == 0:
            return []

        active, lens = drafting, draft_lens[drafting]  # the set only shrinks
        positions = rows.positions[sampled_rows] + 1
        made: list[tuple[np.ndarray, torch.Tensor]] = []  # of each forward
        for position in range(int(lens.max())):
            made.append((active, tokens))
            goes_on = self.policy.continue_drafting(active, confidence, position)
            if self.policy.needs_confidence:  # else `plan` has decided
                self._agree(goes_on)
            goes_on = goes_on & (lens > position + 1)
            num_rows = int(np.count_nonzero(goes_on))
            if num_rows == 0:
                break
            if num_rows < len(active):
                active, lens, positions = (
                    of_each[goes_on] for of_each in (active, lens, positions)
                )
                tokens = tokens[torch.from_numpy(np.flatnonzero(goes_on))]
            rows = RaggedRows.one_each(active, positions + position)
            self._counters.count_draft_forward(num_rows, num_rows)
            tokens, confidence = self._drafter.forward(
                rows, tokens, rows.last_rows, position + 1
            )
        return made

    def _agree(self, *decisions: np.ndarray) -> None:
        if self._check_agreement is not None:
            self._check_agreement(np.concatenate(decisions))


def _on_host(
    made: list[tuple[np.ndarray, torch.Tensor]], lens: np.ndarray
) -> list[list[int]]:
    """The first `lens` drafts of each batch row. `made`: batch rows and their drafts of
    each forward."""
    drafts: list[list[int]] = [[] for _ in lens]
    if made:
        rows, tokens = zip(*made, strict=True)
        # sync: the scheduler needs the drafts on the host
        on_host = torch.cat(tokens).tolist()
        for row, token in zip(np.concatenate(rows).tolist(), on_host, strict=True):
            drafts[row].append(token)
    return [d[:n] for d, n in zip(drafts, lens.tolist(), strict=True)]
