"""Automatic lengths that can be set aside while the engine runs."""

from __future__ import annotations

import numpy as np

from vllm_emssd.draft_length.auto import AutoDraftLength
from vllm_emssd.draft_length.policy import DraftOpportunity


class OverridableDraftLength:
    """As the automatic policy says, unless `num_draft_tokens` is set: then every
    request drafts so many, if it may, and 0 is no speculation.

    The automatic policy goes on hearing how requests fare, but not of drafts that it
    did not ask for.
    """

    needs_confidence = True

    def __init__(self, automatic: AutoDraftLength) -> None:
        self.num_draft_tokens: int | None = None
        self._automatic = automatic

    @property
    def feeds_prompts(self) -> bool:
        if self.num_draft_tokens is None:
            return self._automatic.feeds_prompts
        return self.num_draft_tokens > 0

    def rests(self, num_sampling: int) -> bool:
        if self.num_draft_tokens is None:
            return self._automatic.rests(num_sampling)
        return self.num_draft_tokens == 0

    def begin(self, step: DraftOpportunity) -> np.ndarray:
        if self.num_draft_tokens is None:
            return self._automatic.begin(step)
        return np.minimum(step.max_draft_tokens, self.num_draft_tokens)

    def go_on(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        if self.num_draft_tokens is None:
            return self._automatic.go_on(req_indices, confidence, position)
        return np.ones(len(req_indices), dtype=bool)

    def finish(self, draft_lens: np.ndarray) -> np.ndarray:
        if self.num_draft_tokens is None:
            return self._automatic.finish(draft_lens)
        return draft_lens

    def choose(self, step: DraftOpportunity, confidence: np.ndarray) -> np.ndarray:
        return self._automatic.choose(step, confidence)

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
