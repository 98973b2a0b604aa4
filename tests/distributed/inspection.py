"""What tests ask of the workers of a running engine (vLLM's worker extension)."""

from __future__ import annotations

import os
from typing import Any

from vllm_emssd.draft_length import CostTable
from vllm_emssd.proposers.llma import LlmaProposer


class Inspection:
    """Mixed into the worker class by `worker_extension_cls`."""

    model_runner: Any

    def process_id(self) -> int:
        return os.getpid()

    def costs(self) -> dict[str, Any]:
        """By which drafts are decided on, and the worker's own measurements."""
        meter = self.model_runner.step_costs
        return {
            name: [costs.target.points, costs.draft.points, costs.fixed_ms]
            for name, costs in (("used", meter.costs), ("own", meter.measured))
        }

    def measure_otherwise(self) -> None:
        """The first rank finds drafts nearly free, the others far too expensive; and
        all take over the first one's costs, as they do every 64th step."""
        meter = self.model_runner.step_costs
        draft_ms = 0.1 if self.model_runner._ranks._group.is_first_rank else 1000.0
        meter.measured.target = CostTable([1, 512], [20.0, 20.0])
        if meter._drafter is not None:
            meter.measured.draft = CostTable([1, 512], [draft_ms, draft_ms])
        meter._take_over_costs()

    def disagree(self) -> None:
        """From now on the last rank decides on one draft more than the first."""
        if self.model_runner._ranks._group.is_first_rank:
            return
        proposer = self.model_runner._proposer
        if isinstance(proposer, LlmaProposer):
            lengths = proposer._lengths
            choose = lengths._choose
            lengths._choose = lambda *args: choose(*args) + 1
        else:
            plan = proposer.policy.plan
            proposer.policy.plan = lambda *args: plan(*args) + 1
