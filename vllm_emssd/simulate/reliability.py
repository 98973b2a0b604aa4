"""Automatic lengths that also count how reliable their predictions were."""

from __future__ import annotations

import numpy as np

from vllm_emssd.draft_length import AutoDraftLength, StepCosts

MARGINAL = 10  # the line after the ten deciles


class CountedDraftLength(AutoDraftLength):
    """`reliability` holds sums over verified drafts, by the decile of their predicted
    survival and, in one more line, over *marginal* ones: predicted to bring what they
    cost, within a quarter. [number | predicted | accepted | cost in tokens, line]"""

    def __init__(
        self, costs: StepCosts, num_speculative_tokens: int, may_trim: bool
    ) -> None:
        super().__init__(costs, num_speculative_tokens, may_trim)
        self.reliability = np.zeros((4, 11))
        self._predicted: dict[str, tuple[np.ndarray, float]] = {}  # survival, its cost

    def trim(self, draft_lens: np.ndarray) -> np.ndarray:
        kept = super().trim(draft_lens)
        if self.needs_confidence:
            for i in np.flatnonzero(draft_lens):
                survival = self._survival[i, : draft_lens[i]]
                self._predicted[self._req_ids[i]] = survival, self._verify_cost
        return kept

    def observe(self, req_id: str, num_drafts: int, num_accepted: int) -> None:
        super().observe(req_id, num_drafts, num_accepted)
        survival, cost = self._predicted.pop(req_id, (np.empty(0), 0.0))
        survival = survival[:num_drafts]
        decile = np.minimum((survival * 10).astype(np.int64), 9)
        is_marginal = (survival <= 1.25 * cost) & (cost <= 1.25 * survival)
        is_accepted = np.arange(survival.size) < num_accepted
        ones = np.ones(survival.size)
        values = np.stack([ones, survival, is_accepted, cost * ones])
        for sums, value in zip(self.reliability, values, strict=True):
            sums += np.bincount(decile, value, minlength=11)
            sums[MARGINAL] += value[is_marginal].sum()
