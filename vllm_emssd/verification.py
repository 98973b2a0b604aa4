"""What the target verifies, and what came of it.

Verification is ragged: request r computes `1 + num_draft_tokens[r]` rows. With
`unpad_inputs: false` every request is padded to the step's longest draft, as the
paper's vanilla does; the filler rows cost the target what real ones cost, but are
never compared, so they can never be accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_emssd.metrics import Counters


def pad_to_longest(
    drafts: list[list[int]], may_pad: Sequence[bool], filler: Sequence[int]
) -> list[list[int]]:
    """Drafts of one length: the longest of the step.

    Args:
        drafts: [num_reqs] ragged draft token ids.
        may_pad: [num_reqs], False for requests that verify nothing (prefill).
        filler: [num_reqs] a valid token id to pad each request with.
    """
    longest = max(map(len, drafts), default=0)
    return [
        tokens + [token] * (longest - len(tokens)) if pad else tokens
        for tokens, pad, token in zip(drafts, may_pad, filler, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """What one target forward verifies. Arrays are [num_reqs], in batch order."""

    req_ids: list[str]
    num_scheduled_tokens: np.ndarray  # int64
    num_draft_tokens: np.ndarray  # int64: the scheduled tokens that are drafts
    is_decode: np.ndarray  # bool: the prompt was computed before
    is_sampling: np.ndarray  # bool: the prompt is computed afterwards
    # int64: of the drafts, those that were never to be accepted: filler, and what a
    # grammar forbade after it was scheduled
    num_forbidden: np.ndarray | int = 0

    @property
    def num_possible_drafts(self) -> np.ndarray:
        """Those that could be accepted. [num_reqs] int64"""
        return self.num_draft_tokens - self.num_forbidden

    def count(
        self,
        num_sampled: np.ndarray,
        num_spec_tokens: int,
        counters: Counters,
        is_wanted: np.ndarray | bool = True,
        has_draft_model: bool = True,
        has_head: bool = False,
    ) -> None:
        """Add what came of it.

        Args:
            num_sampled: [num_reqs], 0 where not sampling.
            is_wanted: [num_reqs] bool, False for a request that turned out to have
                ended in an earlier step: rows were computed, nothing came of them.
            has_head: the draft model is an EAGLE head, which padded batches feed no
                token more than the scheduled ones.
        """
        num_sampling = int(np.count_nonzero(self.is_sampling))
        is_counted = self.is_sampling & is_wanted
        num_counted = int(np.count_nonzero(is_counted))
        num_emitted = int(num_sampled[is_counted].sum())
        counters.num_steps += 1
        counters.num_request_steps += num_counted
        counters.num_accepted_tokens += num_emitted - num_counted
        counters.num_emitted_tokens += num_emitted
        counters.num_verify_rows += num_sampling
        counters.num_padded_verify_rows += num_sampling
        if has_draft_model:
            at_least = self.is_decode * (1 + num_spec_tokens)
            num_more = num_spec_tokens - has_head
            padded = np.maximum(self.num_scheduled_tokens, at_least) + num_more
            counters.num_padded_draft_rows += int(padded.sum())
            padded[~self.is_decode] = num_more
            counters.num_padded_draft_rows_decode += int(padded.sum())
        if not self.num_draft_tokens.any():
            return
        num_drafts = self.num_draft_tokens[self.is_sampling]
        num_verifying = int((self.is_decode & self.is_sampling).sum())
        counters.num_draft_tokens += int(self.num_possible_drafts[is_counted].sum())
        counters.num_verify_rows += int(num_drafts.sum())
        counters.num_padded_verify_rows += num_verifying * int(
            num_drafts.max(initial=0)
        )
