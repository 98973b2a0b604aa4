"""How fast decoding goes in the long run, which is what a step's time is worth.

Steps differ: in some nearly all tokens are copied, in others none can be. Choosing the
highest rate in each of them is not the highest in all: what a draft brings in a slow
step must be worth what that time brings in other steps.
"""

from __future__ import annotations

from vllm_emssd.draft_length.cost import StepCosts

_KEEP = 0.95  # weight of earlier steps, at each new one
_LEAST_MS = 1e-6


class LongRunRate:
    """Tokens a millisecond in the long run, kept as a multiple of what steps without
    drafts give, so that it holds for other numbers of requests too."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._tokens = self._ms = 1.0  # over those of steps without drafts

    def tokens_per_ms(self, num_reqs: int) -> float:
        return self._tokens / self._ms * num_reqs / self._plain_ms(num_reqs)

    def step_planned(self, num_reqs: int, tokens: float, ms: float) -> None:
        """A step that is expected to give so many tokens in so many milliseconds."""
        self._tokens += (1 - _KEEP) * (tokens / max(num_reqs, 1) - self._tokens)
        self._ms += (1 - _KEEP) * (ms / self._plain_ms(num_reqs) - self._ms)

    def _plain_ms(self, num_reqs: int) -> float:
        return max(self._costs.fixed_ms + self._costs.target.at(num_reqs), _LEAST_MS)
