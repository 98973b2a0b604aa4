"""Always as many drafts as allowed."""

from __future__ import annotations

import numpy as np


class FixedDraftLength:
    """`draft_length: "fixed"`: every request drafts the most it may."""

    def draft_lengths(self, max_draft_tokens: np.ndarray) -> np.ndarray:
        return max_draft_tokens
