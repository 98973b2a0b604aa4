"""The interface between a proposer and the policy that sets draft lengths.

A step goes: `plan`, then `continue_drafting` after each draft forward, then `trim`;
when the target has verified, `observe` for each request.

For exact output a decision about draft j may depend on anything fixed before j is
sampled, never on its sampled value or a later one's (greedy drafts are exempt: they
are fixed by the text).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Copies:
    """Drafts at hand: those of each request are verified if it makes no others."""

    rows: np.ndarray  # [num_reqs] int64: of the target
    gains: np.ndarray  # [num_reqs] float64: how many are expected to be accepted


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What is known of a step before drafting. All arrays are [num_reqs]."""

    req_ids: Sequence[str]
    is_sampling: np.ndarray  # bool: False for requests in prefill
    max_draft_tokens: np.ndarray  # int64: 0 for requests in prefill
    missing_rows: np.ndarray  # int64: rows the drafter needs before a first draft
    num_prefill_rows: int  # of this step's prompts, likely as many the next
    copies: Copies | None = None

    @property
    def num_sampling(self) -> int:
        return int(np.count_nonzero(self.is_sampling))

    @property
    def base_rows(self) -> int:
        """Of the target, if no request drafts or copies."""
        return self.num_sampling + self.num_prefill_rows


class DraftLengthPolicy:
    """Decides, each step, how many drafts each request makes: here the most it may."""

    needs_confidence = False  # whether `continue_drafting` does, in the latest plan
    feeds_prompts = True  # to the drafter as they are prefilled, not later

    def skips_step(self, num_sampling: int) -> bool:
        """Whether no request drafts in this step, in which `num_sampling` got a token.
        Asked at most once a step, before `plan`, which must not be called then."""
        return False

    def plan(self, step: StepInfo) -> np.ndarray:
        """Most drafts of each request this step, 0 to make none. [num_reqs] int64"""
        return step.max_draft_tokens

    def continue_drafting(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        """Which requests draft once more. [num_drafting] bool

        Args:
            req_indices: [num_drafting] rows of the step's arrays.
            confidence: [num_drafting] highest probability where draft `position` was
                made; None unless it is needed.
        """
        return np.ones(len(req_indices), dtype=bool)

    def trim(self, draft_lens: np.ndarray) -> np.ndarray:
        """How many of the drafts made are verified. Both [num_reqs] int64."""
        return draft_lens

    def observe(self, req_id: str, num_drafts: int, num_accepted: int) -> None:
        """The target verified the first drafts of a request, 0 where it verified none
        or another proposer's, and accepted a prefix."""

    def observe_step(self, num_drafts: np.ndarray, num_accepted: np.ndarray) -> None:
        """As `observe`, of all requests of a step whose drafts were made without their
        confidence. Both [num_reqs] int64."""

    def release(self, req_id: str) -> None:
        """Forget a finished request."""


class FixedDraftLength(DraftLengthPolicy):
    """Every request makes `num_draft_tokens`, as far as it may."""

    def __init__(self, num_draft_tokens: int) -> None:
        self._num_draft_tokens = num_draft_tokens
        self.feeds_prompts = num_draft_tokens != 0

    def skips_step(self, num_sampling: int) -> bool:
        return self._num_draft_tokens == 0

    def plan(self, step: StepInfo) -> np.ndarray:
        return np.minimum(step.max_draft_tokens, self._num_draft_tokens)
