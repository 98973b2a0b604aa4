"""Draft lengths by oracle: a bound that no policy can know enough to reach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_emssd.draft_length import DraftLengthPolicy, StepCosts, StepInfo
from vllm_emssd.metrics import Counters
from vllm_emssd.simulate.drafters import DrafterSetting, ModelDrafting
from vllm_emssd.simulate.request import SimulatedRequest


class ForesightDraftLength(DraftLengthPolicy):
    """The lengths of the best plan, were it known which drafts will be accepted: all of
    those up to one depth for the batch, none beyond."""

    def __init__(self, costs: StepCosts) -> None:
        self.num_acceptable = np.zeros(0, dtype=np.int64)  # [num_reqs] in this step
        self._costs = costs

    def plan(self, step: StepInfo) -> np.ndarray:
        costs = self._costs
        most = np.minimum(self.num_acceptable, step.max_draft_tokens)
        by_depth = most > np.arange(most.max(initial=0))[:, None]
        num_reqs = np.concatenate([[0], by_depth.sum(axis=1)])  # in each draft forward
        num_drafts = num_reqs.cumsum()
        ms = costs.target.ms(step.base_rows + num_drafts) + costs.fixed_ms
        ms += costs.target.at(step.num_sampling)
        ms = ms - costs.target.at(step.base_rows) + costs.draft.ms(num_reqs).cumsum()
        ms[1:] += costs.speculation_ms
        depth = int(((step.num_sampling + num_drafts) / ms).argmax())
        self._lens = np.minimum(most, depth)
        return self._lens

    def continue_drafting(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        return np.asarray(self._lens[req_indices] > position + 1)


class ForesightDrafting(ModelDrafting):
    """Tells its policy what the trace says of the drafts to come."""

    def __init__(
        self, policy: ForesightDraftLength, counters: Counters, setting: DrafterSetting
    ) -> None:
        super().__init__(policy, counters, setting, knows_the_end=True)
        self._policy = policy

    def _look_up(self, requests: Sequence[SimulatedRequest]) -> None:
        super()._look_up(requests)
        self._policy.num_acceptable = self._drafter.num_acceptable()
