"""A target whose answer is written down beforehand: what would a proposer save?

One request, greedy: each step verifies the drafts against the script, accepts the part
that agrees and adds one token. Counts only, no models and no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_emssd.proposers.base import DraftBatch, Proposer


@dataclass(frozen=True, slots=True)
class Replay:
    """What one answer took."""

    num_forwards: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def tokens_per_forward(self) -> float:
        return self.num_accepted_tokens / self.num_forwards + 1

    @property
    def accepted_per_verified_row(self) -> float:
        """Rows: one for each token the target adds, one for each draft."""
        return self.num_accepted_tokens / (self.num_forwards + self.num_draft_tokens)


def batch_of_one(
    req_id: str,
    token_ids: np.ndarray,
    num_tokens: int,
    num_prompt_tokens: int,
    most: int,
) -> DraftBatch:
    """`token_ids`: [1, max_model_len], of which `num_tokens` are known."""
    one = np.array([1], dtype=np.int64)
    return DraftBatch(
        req_ids=[req_id],
        token_ids=token_ids,
        num_tokens=one * num_tokens,
        num_prompt_tokens=one * num_prompt_tokens,
        num_scheduled_tokens=one,
        num_prefilled_tokens=one * (num_tokens - 1),
        is_sampling=np.array([True]),
        max_draft_tokens=one * most,
    )


def replay(
    proposer: Proposer,
    prompt: Sequence[int],
    answer: Sequence[int],
    most: int,
    req_id: str = "r",
) -> Replay:
    """The first token comes from the prompt alone; drafts begin after it."""
    whole = [*prompt, *answer]
    token_ids = np.full((1, len(whole)), -1, dtype=np.int32)  # unknown yet
    num_known = len(prompt) + 1
    token_ids[0, :num_known] = whole[:num_known]
    num_forwards = num_drafts = num_accepted = 0
    proposer.record_verified(req_id, 0, 0)
    while num_known < len(whole):
        room = min(most, len(whole) - num_known - 1)
        batch = batch_of_one(req_id, token_ids, num_known, len(prompt), room)
        [drafts] = proposer.propose(batch)
        assert len(drafts) <= room
        agrees = [
            d == w
            for d, w in zip(drafts, whole[num_known : num_known + room], strict=False)
        ]
        accepted = [*agrees, False].index(False)
        end = num_known + accepted + 1
        token_ids[0, num_known:end] = whole[num_known:end]
        num_known = end
        proposer.record_verified(req_id, len(drafts), accepted)
        num_forwards += 1
        num_drafts += len(drafts)
        num_accepted += accepted
    return Replay(num_forwards, num_drafts, num_accepted)
