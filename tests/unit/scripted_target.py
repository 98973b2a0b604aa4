"""A target whose answer is written down beforehand: what would a proposer save?

One request, greedy: each step verifies the drafts against the script, accepts the part
that agrees and adds one token. Counts only, no models and no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.unit.draft_batches import batch_of
from vllm_emssd.proposers.base import Proposer


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


def replay(
    proposer: Proposer,
    prompt: Sequence[int],
    answer: Sequence[int],
    most: int,
    req_id: str = "r",
) -> Replay:
    """The first token comes from the prompt alone; drafts begin after it."""
    whole = [*prompt, *answer]
    num_known = len(prompt) + 1
    num_forwards = num_drafts = num_accepted = 0
    proposer.record_verified(req_id, 0, 0)
    while num_known < len(whole):
        room = min(most, len(whole) - num_known - 1)
        batch = batch_of(
            {req_id: whole[:num_known]},
            [room],
            num_prompt_tokens=[len(prompt)],
            num_scheduled_tokens=[1],
            num_prefilled_tokens=[num_known - 1],
        )
        [drafts] = proposer.propose(batch)
        assert len(drafts) <= room
        agrees = [
            d == w
            for d, w in zip(drafts, whole[num_known : num_known + room], strict=False)
        ]
        accepted = [*agrees, False].index(False)
        num_known += accepted + 1
        proposer.record_verified(req_id, len(drafts), accepted)
        num_forwards += 1
        num_drafts += len(drafts)
        num_accepted += accepted
    return Replay(num_forwards, num_drafts, num_accepted)
