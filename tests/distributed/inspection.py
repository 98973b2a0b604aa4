"""What tests ask of the workers of a running engine (vLLM's worker extension)."""

from __future__ import annotations

import os
from typing import Any


class Inspection:
    """Mixed into the worker class by `worker_extension_cls`."""

    model_runner: Any

    def process_id(self) -> int:
        return os.getpid()

    def prices(self) -> dict[str, Any]:
        """By which drafts are decided on, and the worker's own measurements."""
        meter = self.model_runner._step_costs
        return {
            name: [costs.target.points, costs.draft.points, costs.fixed_ms]
            for name, costs in (("used", meter.costs), ("own", meter.measured))
        }

    def disagree(self) -> None:
        """From now on the last rank decides on one draft more than the first."""
        if self.model_runner._ranks.is_first:
            return
        policy = self.model_runner._proposer._policy._policy
        begin, choose = policy.begin, policy.choose
        policy.begin = lambda *args: begin(*args) + 1
        policy.choose = lambda *args: choose(*args) + 1
