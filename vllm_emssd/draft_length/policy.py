"""The interface between a proposer and the policy that sets draft lengths."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class DraftLengthPolicy(Protocol):
    """Decides, each step, how many drafts each request makes.

    For exact output a decision may depend on anything fixed before a draft is
    sampled, never on the sampled token itself (greedy drafts are exempt).
    """

    def draft_lengths(self, max_draft_tokens: np.ndarray) -> np.ndarray:
        """Drafts to make, 0 included.

        Shapes: both [num_reqs] int64; the result never exceeds `max_draft_tokens`.
        """
        ...
