"""Always as many drafts as allowed, or as were asked for."""

from __future__ import annotations

import numpy as np

from vllm_emssd.draft_length.policy import DraftOpportunity


class FixedDraftLength:
    """`draft_length: "fixed"`: every request drafts the most it may.

    Args:
        most: drafts of a request, if fewer; 0 is no speculation.
    """

    needs_confidence = False
    _most: int | None = None

    def __init__(self, most: int | None = None) -> None:
        self._most = most

    @property
    def feeds_prompts(self) -> bool:
        return self._most != 0

    def rests(self, num_tokens_anyway: float) -> bool:
        return self._most == 0

    def begin(self, step: DraftOpportunity) -> np.ndarray:
        if self._most is None:
            return step.max_draft_tokens
        return np.minimum(step.max_draft_tokens, self._most)

    def go_on(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        return np.ones(len(req_indices), dtype=bool)

    def finish(self, draft_lens: np.ndarray) -> np.ndarray:
        return draft_lens

    def choose(self, step: DraftOpportunity, confidence: np.ndarray) -> np.ndarray:
        return step.max_draft_tokens

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        """Nothing to learn."""

    observe_others = observe

    def release(self, req_id: str) -> None:
        """Nothing is kept."""
