"""A closed loop around a draft-length policy: costs and acceptance, but no models.

Time is simulated: each step costs what the tables say of the rows it computed. Drafts
are accepted with probabilities drawn per draft, which the policy sees only through a
confidence that is wrong in a known way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vllm_emssd.draft_length import (
    AutoDraftLength,
    CostTable,
    DraftLengthPolicy,
    FixedDraftLength,
    StepCosts,
    StepInfo,
)

FAR = 512  # rows a table reaches
Quality = Callable[[int, int], float]  # (step, slot) -> mean acceptance of a draft


def staircase(first_ms: float, per_row_ms: float, free_rows: int) -> CostTable:
    """Weights are read for `first_ms`, `free_rows` come with them, others cost."""
    return CostTable(
        [1, free_rows, FAR], [first_ms, first_ms, first_ms + per_row_ms * FAR]
    )


def made_costs(
    draft_ms: float = 2.0,
    target_ms: float = 20.0,
    per_row_ms: float = 0.4,
    free_rows: int = 4,
    fixed_ms: float = 4.0,
) -> StepCosts:
    """A drafter whose rows are cheaper than the target's by the same ratio."""
    return StepCosts(
        staircase(target_ms, per_row_ms, free_rows),
        staircase(draft_ms, per_row_ms * draft_ms / target_ms, free_rows),
        fixed_ms,
    )


def auto_policy(costs: StepCosts, num_spec_tokens: int) -> AutoDraftLength:
    return AutoDraftLength(costs, num_spec_tokens, may_trim=True)


@dataclass
class Step:
    """What one step did."""

    ms: float = 0.0
    draft_ms: float = 0.0
    tokens: int = 0
    made: list[int] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)


class Loop:
    """Steps of a batch whose requests live for `lifetime` tokens, then give way to new
    ones with a prompt the drafter has not seen.

    Args:
        quality: mean acceptance by step and batch row.
        spread: how much acceptance varies from draft to draft, 0 to 1.
        power: confidence is acceptance to this power; 1 is calibrated.
        meter: costs that the policy goes by, if others, which learn from each forward.
    """

    def __init__(
        self,
        policy: DraftLengthPolicy,
        costs: StepCosts,
        num_reqs: int,
        quality: Quality,
        *,
        num_spec_tokens: int = 8,
        spread: float = 0.5,
        power: float = 0.5,
        lifetime: int = 150,
        prompt: int = 40,
        seed: int = 0,
        meter: StepCosts | None = None,
    ) -> None:
        self.num_plans = 0
        self.policy, self._costs, self._meter = policy, costs, meter
        self._num_reqs, self._quality = num_reqs, quality
        self._k, self._spread, self._power = num_spec_tokens, spread, power
        self._lifetime, self._prompt = lifetime, prompt
        self._rng = np.random.default_rng(seed)
        self._num_started = 0
        self._req_ids = [self._start() for i in range(num_reqs)]
        self._left = self._rng.integers(1, lifetime, num_reqs)
        self._missing = np.full(num_reqs, prompt)
        self.steps: list[Step] = []

    def run(self, num_steps: int) -> Loop:
        for _ in range(num_steps):
            self.steps.append(self._step())
        return self

    def tokens_per_ms(self, first_step: int = 0) -> float:
        steps = self.steps[first_step:]
        return sum(s.tokens for s in steps) / sum(s.ms for s in steps)

    def _start(self) -> str:
        self._num_started += 1
        return f"r{self._num_started}"

    def _draw(self) -> np.ndarray:
        """Acceptance of every draft that could be made. [num_reqs, K]"""
        now = len(self.steps)
        mean = np.array([self._quality(now, i) for i in range(self._num_reqs)])
        reach = self._spread * np.minimum(mean, 1 - mean)
        noise = self._rng.uniform(-1, 1, (self._num_reqs, self._k))
        return mean[:, None] + reach[:, None] * noise

    def _step(self) -> Step:
        acceptance = self._draw()
        is_accepted = self._rng.random(acceptance.shape) < acceptance
        runs = np.logical_and.accumulate(is_accepted, axis=1).sum(axis=1)
        self.num_acceptable = dict(zip(self._req_ids, runs.tolist(), strict=True))
        step, made, kept = self._draft(acceptance**self._power)
        accepted = np.minimum(runs, kept)
        step.made, step.verified = made.tolist(), kept.tolist()
        rows = self._num_reqs + int(kept.sum())
        step.ms += self._costs.fixed_ms + float(self._costs.target.ms(np.array(rows)))
        step.ms += self._costs.speculation_ms * bool(made.any())
        step.tokens = self._num_reqs + int(accepted.sum())
        fed = np.maximum(made - 1, 0)
        left = np.where(made > 0, 0, self._missing)
        self._missing = left + accepted - np.minimum(accepted, fed) + 1
        for i, req_id in enumerate(self._req_ids):
            self.policy.observe(req_id, int(kept[i]), int(accepted[i]))
        self._left = self._left - 1 - accepted
        for i in np.flatnonzero(self._left <= 0):
            self.policy.release(self._req_ids[i])
            self._req_ids[i] = self._start()
            self._left[i], self._missing[i] = self._lifetime, self._prompt
        return step

    def _draft(self, confidence: np.ndarray) -> tuple[Step, np.ndarray, np.ndarray]:
        """As the runner and `DraftModelProposer` do."""
        nothing = np.zeros(self._num_reqs, dtype=np.int64)
        if self.policy.skips_step(self._num_reqs):
            return Step(), nothing, nothing
        self.num_plans += 1
        info = StepInfo(
            list(self._req_ids),
            np.ones(self._num_reqs, dtype=bool),
            np.full(self._num_reqs, self._k),
            self._missing,
            0,
        )
        lens = self.policy.plan(info)
        made = np.zeros(self._num_reqs, dtype=np.int64)
        active = np.flatnonzero(lens)
        rows = int(self._missing[active].sum())
        step = Step()
        if active.size == 0:
            return step, made, made
        for position in range(int(lens.max())):
            ms = float(self._costs.draft.ms(np.array(rows)))
            if self._meter is not None:
                self._meter.draft.observe(rows, ms)
            made[active] = position + 1
            told = None
            if self.policy.needs_confidence:
                told = confidence[active, position]
                ms += self._costs.confidence_ms
                ms += self._costs.deciding_ms * (position == 0)
            step.draft_ms += ms
            goes_on = self.policy.continue_drafting(active, told, position)
            active = active[goes_on & (lens[active] > position + 1)]
            rows = active.size
            if rows == 0:
                break
        step.ms = step.draft_ms
        return step, made, self.policy.trim(made)


def best_fixed(
    lengths: tuple[int, ...], num_steps: int, first_step: int, **setting: object
) -> tuple[float, int]:
    """Tokens a ms and K of the best fixed length."""
    found = [
        (
            Loop(FixedDraftLength(k), **setting)
            .run(num_steps)
            .tokens_per_ms(first_step),  # type: ignore[arg-type]
            k,
        )
        for k in lengths
    ]
    return max(found, default=(-math.inf, 0))
