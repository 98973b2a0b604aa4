"""The interface between a proposer and the policy that sets draft lengths.

A step goes: `begin`, then after each draft forward `go_on`, then `finish`; when the
target has verified, `observe` for each request.

For exact output a decision about draft j may depend on anything fixed before j is
sampled, never on its sampled value or a later one's (greedy drafts are exempt: they
are fixed by the text).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Copies:
    """Drafts at hand: those of each request are verified if it makes no others."""

    rows: np.ndarray  # [num_reqs] int64: of the target
    gains: np.ndarray  # [num_reqs] float64: how many are expected to be accepted

    def worth(self, token_worth: np.ndarray) -> Copies:
        """The same, gains by what a token of each request is worth. [num_reqs]"""
        return Copies(self.rows, self.gains * token_worth)


@dataclass(frozen=True, slots=True)
class DraftOpportunity:
    """What is known of a step before drafting. All arrays are [num_reqs]."""

    req_ids: Sequence[str]
    is_sampling: np.ndarray  # bool: False for requests in prefill
    max_draft_tokens: np.ndarray  # int64: 0 for requests in prefill
    missing_rows: np.ndarray  # int64: rows the drafter needs before a first draft
    num_prefill_rows: int  # of this step's prompts, likely as many the next
    copies: Copies | None = None

    @property
    def can_copy(self) -> bool:
        """Whether any request has a copy at hand."""
        return self.copies is not None and bool(self.copies.rows.any())

    @property
    def num_tokens_anyway(self) -> np.ndarray:
        """To expect of each request if none drafts. float64"""
        gains = 0.0 if self.copies is None else self.copies.gains
        return np.asarray((1.0 + gains) * self.is_sampling)

    @property
    def num_rows_anyway(self) -> int:
        """Of the target, if none drafts."""
        num_copied = 0 if self.copies is None else int(self.copies.rows.sum())
        return int(self.is_sampling.sum()) + self.num_prefill_rows + num_copied


class DraftLengthPolicy(Protocol):
    """Decides, each step, how many drafts each request makes."""

    needs_confidence: bool  # else `go_on` may be given None

    @property
    def feeds_prompts(self) -> bool:
        """Whether prompts are fed to the drafter as they are prefilled, not later."""
        ...

    def rests(self, num_tokens_anyway: float) -> bool:
        """Whether nobody drafts this step, whoever is in it. To be asked at most once a
        step, before `begin`, which must not be called then.

        `num_tokens_anyway`: to expect of the step without drafts of the policy's.
        """
        ...

    def begin(self, step: DraftOpportunity) -> np.ndarray:
        """Most drafts of each request this step, 0 to make none. [num_reqs] int64"""
        ...

    def go_on(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        """Which requests draft once more.

        Args:
            req_indices: [num_drafting] rows of the step's arrays.
            confidence: [num_drafting] highest probability where draft `position` was
                made.

        Returns: [num_drafting] bool.
        """
        ...

    def finish(self, draft_lens: np.ndarray) -> np.ndarray:
        """How many of the drafts made are verified. Both [num_reqs] int64."""
        ...

    def choose(self, step: DraftOpportunity, confidence: np.ndarray) -> np.ndarray:
        """How many of the drafts that cost nothing to make (copies) are verified.

        Takes the place of `begin`, `go_on` and `finish`. `step.max_draft_tokens` are
        the lengths made, `step.copies` what others have at hand. May be asked again in
        a step when some of those have changed. `confidence`: [num_reqs, longest].
        Returns [num_reqs] int64.
        """
        ...

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        """The target verified the first `num_draft_tokens` of a request's drafts."""
        ...

    def observe_others(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        """Like `observe`, but the drafts were made by another proposer, under another
        policy: all they tell is how the request gets on."""
        ...

    def release(self, req_id: str) -> None:
        """Forget a finished request."""
        ...
