"""`draft_length: "auto"`: as many drafts as earn more than they cost, 0 included."""

from __future__ import annotations

from functools import partial

import numpy as np

from vllm_emssd.draft_length.acceptance import AcceptanceEstimator
from vllm_emssd.draft_length.cost import StepCosts
from vllm_emssd.draft_length.planner import LongRunRate, Plan, best_plan
from vllm_emssd.draft_length.policy import DraftLengthPolicy, StepInfo
from vllm_emssd.draft_length.probing import LEAST_GAIN, Probing

_PROBE_LENGTH = 2
_SURVEY_STEPS = 16  # from one step that asks for confidences in any case to the next
_CONTROL_STEPS = 64  # from one step by depth, for comparison, to the next
_GAIN_STEPS = 4  # from one measurement of what stopping gains to the next
_GAIN_RATE = 0.05  # weight of one


class AutoDraftLength(DraftLengthPolicy):
    """Chooses a depth for the batch and stops requests by the confidence of their
    drafts, where that earns more than telling confidences costs.

    Args:
        costs: refreshed by the caller.
        num_speculative_tokens: most drafts of a request.
        may_trim: whether drafts that turn out unlikely may be left out of verification.
        uses_confidence: False where the caller never tells it: the depth decides.
    """

    def __init__(
        self,
        costs: StepCosts,
        num_speculative_tokens: int,
        may_trim: bool,
        uses_confidence: bool = True,
    ) -> None:
        self.costs = costs
        self.acceptance = AcceptanceEstimator(num_speculative_tokens)
        self._may_trim = may_trim
        self._uses_confidence = uses_confidence
        self._probing = Probing()
        self._rate = LongRunRate(costs)
        self._made: dict[str, np.ndarray] = {}  # confidences of drafts to be verified
        self._num_plans = 0
        self._stopping_gain = 0.0  # tokens a request and step, confidences' cost off
        self._is_probe = False
        self.needs_confidence = uses_confidence

    def skips_step(self, num_sampling: int) -> bool:
        return self._probing.skips_step(num_sampling)

    def plan(self, step: StepInfo) -> np.ndarray:
        most = self._most = step.max_draft_tokens
        if not most.any():
            return most  # which says nothing about whether drafts pay
        self._req_ids = step.req_ids
        self._has_prompts = step.num_prefill_rows > 0
        self.acceptance.update()
        planned = partial(
            best_plan,
            step,
            costs=self.costs,
            tokens_per_ms=self._rate.tokens_per_ms(step.num_sampling),
            stopping_gain=max(self._stopping_gain, 0.0),
        )
        plan = planned(self.acceptance.by_depth)
        if self.feeds_prompts and plan.gain < LEAST_GAIN:
            # Idle only if drafts would not pay even were acceptance better than
            # estimated: an idle engine learns nothing.
            plan = planned(self.acceptance.hoped_for())
        self._plan = plan
        pays = self.feeds_prompts = self._probing.pays(plan.gain, step.num_sampling)
        depth = plan.depth if pays else 0
        self._rate.step_planned(step.num_sampling, plan.tokens[depth], plan.ms[depth])
        if not pays:
            return self._maybe_probe(step, plan)
        self._num_plans += 1
        is_survey = self._num_plans % _SURVEY_STEPS == 0
        self._is_probe = False
        is_control = self._num_plans % _CONTROL_STEPS == _SURVEY_STEPS // 2  # no survey
        asks = is_survey or (self._stopping_gain >= 0 and not is_control)
        self.needs_confidence = self._uses_confidence and asks
        if self.needs_confidence:
            self._set_thresholds(plan, len(most))
            return np.where(plan.may_draft, most, 0)
        return np.where(plan.may_draft, np.minimum(most, plan.depth), 0)

    def _set_thresholds(self, plan: Plan, num_reqs: int) -> None:
        """In tokens at the plan's rate: what it costs to verify a draft, to make and
        verify one, and to run a forward for them."""
        rate = plan.tokens_per_ms
        self._verify_cost = rate * plan.verify_ms
        self._draft_cost = rate * (plan.verify_ms + plan.draft_ms)
        self._forward_cost = rate * (plan.forward_ms + self.costs.confidence_ms)
        shape = (num_reqs, self.acceptance.num_speculative_tokens)
        self._survival, self._confidence = np.zeros((2, *shape))

    def _maybe_probe(self, step: StepInfo, plan: Plan) -> np.ndarray:
        """A few drafts of the request that is cheapest to try, if it is time."""
        lens = np.zeros_like(self._most)
        missing = np.where(self._most > 0, step.missing_rows, np.iinfo(np.int64).max)
        request, draft = int(missing.argmin()), self.costs.draft
        probe_ms = draft.at(int(missing[request])) + draft.at(1)
        probe_ms += self.costs.speculation_ms + _PROBE_LENGTH * plan.verify_ms
        if self._probing.is_due(probe_ms, float(plan.ms[0])):
            self.acceptance.doubt()
            self._is_probe = True
            self.needs_confidence = self._uses_confidence
            self._set_thresholds(plan, len(lens))
            lens[request] = min(_PROBE_LENGTH, int(self._most[request]))
        return lens

    def continue_drafting(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        if not self.needs_confidence:
            return np.ones(len(req_indices), dtype=bool)
        assert confidence is not None
        before = self._survival[req_indices, position - 1] if position else 1.0
        survival = self.acceptance.survival(confidence, before)
        self._survival[req_indices, position] = survival
        self._confidence[req_indices, position] = confidence
        may = self._most[req_indices] > position + 1
        if self._is_probe or not may.any():
            return np.asarray(may)
        gain = survival * self.acceptance.by_depth[position + 1] - self._draft_cost
        pays = may & (gain > 0)
        return pays & bool(gain[pays].sum() > self._forward_cost)

    def trim(self, draft_lens: np.ndarray) -> np.ndarray:
        if not self.needs_confidence or not draft_lens.any():
            return draft_lens
        kept = draft_lens
        if self._may_trim and not self._is_probe:
            kept = self._kept()
        if self._num_plans % _GAIN_STEPS == 0 and not self._is_probe:
            self._measure_gain(draft_lens, kept)
        for i in np.flatnonzero(draft_lens):
            confidence = self._confidence[i, : draft_lens[i]]
            if kept[i]:
                self._made[self._req_ids[i]] = confidence
            else:
                self.acceptance.observe(confidence, 0, 0)
        return kept

    def _kept(self) -> np.ndarray:
        """The drafts worth their rows, and the likeliest others in rows that would be
        padding. [num_reqs] int64"""
        pays = self._survival > self._verify_cost
        rows = self._plan.rows + int(pays.sum())
        room = self.costs.computed_rows(rows) - rows
        if room > 0 and not self._has_prompts:  # whose rows the next step may not have
            left = np.where(pays, 0.0, self._survival)
            likeliest = np.argsort(-left, axis=None, kind="stable")
            room = min(room, int(np.count_nonzero(left)))
            pays.flat[likeliest[:room]] = True
        return pays.sum(axis=1)

    def _measure_gain(self, made: np.ndarray, kept: np.ndarray) -> None:
        """What stopping and trimming gained in this step over the plan's depth for all;
        drafts that were not made are taken to do as those of their depth do."""
        plan, acceptance = self._plan, self.acceptance.by_depth
        position = np.arange(len(acceptance))
        is_made = position < made[:, None]
        last = np.take_along_axis(self._survival, np.maximum(made[:, None] - 1, 0), 1)
        beyond = last * np.where(is_made, 1.0, acceptance).cumprod(axis=1)
        survival = np.where(is_made, self._survival, beyond)
        drafts = made > 0
        by_plan = (survival[drafts, : plan.depth] - self._draft_cost).sum()
        by_plan -= plan.tokens_per_ms * plan.forward_ms * plan.depth
        is_kept = position < kept[:, None]
        by_confidence = (survival[is_kept] - self._verify_cost).sum()
        by_confidence -= made.sum() * (self._draft_cost - self._verify_cost)
        by_confidence -= self._forward_cost * made.max(initial=0)
        besides_ms = self.costs.deciding_ms
        if not plan.depth:  # else the plan has paid for it
            besides_ms += self.costs.speculation_ms
        by_confidence -= plan.tokens_per_ms * besides_ms
        gain = float(by_confidence - by_plan) / max(int(drafts.sum()), 1)
        self._stopping_gain += _GAIN_RATE * (gain - self._stopping_gain)

    def observe(self, req_id: str, num_drafts: int, num_accepted: int) -> None:
        confidence = self._made.pop(req_id, None)
        self.acceptance.observe(confidence, num_drafts, num_accepted)
        if 0 < num_drafts == num_accepted:
            self._probing.drafts_accepted()

    def observe_step(self, num_drafts: np.ndarray, num_accepted: np.ndarray) -> None:
        self.acceptance.observe_step(num_drafts, num_accepted)
        if ((num_drafts > 0) & (num_drafts == num_accepted)).any():
            self._probing.drafts_accepted()

    def release(self, req_id: str) -> None:
        self._made.pop(req_id, None)

    def forget_drafts(self) -> None:
        """What became of the drafts made so far will not be observed."""
        self._made.clear()
