"""A plan that holds for a few steps, while the batch stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_emssd.draft_length.policy import DraftOpportunity


@dataclass(slots=True)
class PlannedBatch:
    """Of whom a plan was made, and who drafts by it. Arrays are [num_reqs]."""

    req_ids: list[str]
    is_sampling: np.ndarray
    num_rows_anyway: int
    drafts: np.ndarray  # bool
    num_steps_left: int

    def holds_for(self, step: DraftOpportunity, most_missing: int) -> bool:
        """The same batch, and nobody to catch up."""
        return (
            self.num_steps_left > 0
            and not step.can_copy
            and self.num_rows_anyway == step.num_rows_anyway
            and self.req_ids == step.req_ids
            and bool((self.is_sampling == step.is_sampling).all())
            and int(step.missing_rows.max()) <= most_missing
        )
