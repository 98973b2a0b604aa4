"""Automatic lengths that can be set aside while the engine runs."""

from __future__ import annotations

import numpy as np

from vllm_emssd.draft_length.auto import AutoDraftLength
from vllm_emssd.draft_length.fixed import FixedDraftLength
from vllm_emssd.draft_length.policy import DraftLengthPolicy, DraftOpportunity


class OverridableDraftLength:
    """As the automatic policy says, unless lengths are fixed.

    The automatic policy goes on hearing how requests fare, but not of drafts that it
    did not ask for.
    """

    needs_confidence = True

    def __init__(self, automatic: AutoDraftLength) -> None:
        self._automatic = automatic
        self._chosen: DraftLengthPolicy = automatic

    def fix(self, num_draft_tokens: int | None) -> None:
        """Every request drafts so many from now on, if it may; None: automatic."""
        fixed = num_draft_tokens is not None
        self._chosen = FixedDraftLength(num_draft_tokens) if fixed else self._automatic

    @property
    def feeds_prompts(self) -> bool:
        return self._chosen.feeds_prompts

    def rests(self, num_tokens_anyway: float) -> bool:
        return self._chosen.rests(num_tokens_anyway)

    def begin(self, step: DraftOpportunity) -> np.ndarray:
        return self._chosen.begin(step)

    def go_on(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        return self._chosen.go_on(req_indices, confidence, position)

    def finish(self, draft_lens: np.ndarray) -> np.ndarray:
        return self._chosen.finish(draft_lens)

    def choose(self, step: DraftOpportunity, confidence: np.ndarray) -> np.ndarray:
        return self._chosen.choose(step, confidence)

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        self._automatic.observe(req_id, num_draft_tokens, num_accepted_tokens)

    def observe_others(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        self._automatic.observe_others(req_id, num_draft_tokens, num_accepted_tokens)

    def release(self, req_id: str) -> None:
        self._automatic.release(req_id)
