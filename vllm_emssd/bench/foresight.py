"""Draft lengths by foresight: a bound that no policy can know enough to reach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_emssd.bench.drafting import DrafterSetting, ModelDrafting
from vllm_emssd.bench.simulated_request import SimulatedRequest
from vllm_emssd.draft_length import DraftOpportunity, StepCosts
from vllm_emssd.draft_length.goodput import plan
from vllm_emssd.metrics import Counters


class ForesightDraftLength:
    """The lengths of the best plan, were it known which drafts will be accepted.

    Each step is planned by itself, as in `AutoDraftLength`, with survivals of 1 and 0.
    """

    needs_confidence = True  # as automatic lengths: nothing beyond a request's end
    feeds_prompts = True

    def __init__(self, costs: StepCosts) -> None:
        self.num_acceptable = np.zeros(0, dtype=np.int64)  # [num_reqs] in this step
        self._costs = costs

    def rests(self, num_tokens_anyway: float) -> bool:
        return False

    def begin(self, step: DraftOpportunity) -> np.ndarray:
        most = np.minimum(self.num_acceptable, step.max_draft_tokens)
        positions = np.arange(most.max(initial=0))
        self._lens = plan(
            (positions < most[:, None]).astype(float),
            step.missing_rows,
            int(step.is_sampling.sum()),
            step.num_prefill_rows,
            self._costs,
        ).draft_lens
        return self._lens

    def go_on(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        return np.asarray(self._lens[req_indices] > position + 1)

    def finish(self, draft_lens: np.ndarray) -> np.ndarray:
        return draft_lens

    def choose(self, step: DraftOpportunity, confidence: np.ndarray) -> np.ndarray:
        raise NotImplementedError("foresight is of a draft model's trace")

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        """There is nothing to learn."""

    observe_others = observe

    def release(self, req_id: str) -> None:
        """Nothing is kept."""


class ForesightDrafting(ModelDrafting):
    """Tells its policy what the trace says of the drafts to come."""

    def __init__(
        self, policy: ForesightDraftLength, counters: Counters, setting: DrafterSetting
    ) -> None:
        super().__init__(policy, counters, setting)
        self._policy = policy

    def _look_up(self, requests: Sequence[SimulatedRequest]) -> None:
        super()._look_up(requests)
        self._policy.num_acceptable = self._drafter.num_acceptable()
