"""What tests ask of the workers of a running engine (vLLM's worker extension)."""

from __future__ import annotations

import os
from typing import Any


class Inspection:
    """Mixed into the worker class by `worker_extension_cls`."""

    model_runner: Any

    def process_id(self) -> int:
        return os.getpid()

    def num_threads(self) -> int:
        import torch

        return torch.get_num_threads()

    def prices(self) -> dict[str, Any]:
        """By which drafts are decided on, and the worker's own measurements."""
        meter = self.model_runner._step_costs
        return {
            name: [costs.target.points, costs.draft.points, costs.fixed_ms]
            for name, costs in (("used", meter.costs), ("own", meter.measured))
        }

    def disagree(self) -> None:
        """From now on the last rank drafts one token fewer than it decides to."""
        if self.model_runner._ranks.is_alone or self.model_runner._ranks.is_first:
            return
        policy = self.model_runner._proposer._policy._policy
        begin = policy.begin
        policy.begin = lambda step: (begin(step) - 1).clip(0)
