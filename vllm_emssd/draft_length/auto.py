"""`draft_length: "auto"`: as many drafts as earn more than they cost, 0 included."""

from __future__ import annotations

import numpy as np

from vllm_emssd.draft_length.acceptance import AcceptanceEstimator
from vllm_emssd.draft_length.cost import StepCosts
from vllm_emssd.draft_length.planner import Plan, best_plan
from vllm_emssd.draft_length.policy import DraftLengthPolicy, StepInfo
from vllm_emssd.draft_length.probing import Probing

_PROBE_LENGTH = 2
_SURVEY_STEPS = 16  # from one step that asks for confidences in any case to the next
_CONTROL_STEPS = 64  # from one step by depth, for comparison, to the next
_GAIN_STEPS = 4  # from one measurement of what stopping gains to the next
_GAIN_RATE = 0.05  # weight of one
_LEAST_MS = 1e-6


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
        self.needs_confidence = uses_confidence
        self._may_trim = may_trim
        self._uses_confidence = uses_confidence
        self._probing = Probing()
        self._unknown = np.full(num_speculative_tokens, np.nan)
        # Confidences of drafts, [K], that wait to be verified; and of those that were,
        # with how many were verified and accepted.
        self._made: dict[str, np.ndarray] = {}
        self._verified: list[tuple[np.ndarray, int, int]] = []
        self._num_plans = 0
        self._stopping_gain = 0.0  # tokens a request and step, confidences' cost off

    def skips_step(self, num_sampling: int) -> bool:
        return self._probing.skips_step(num_sampling)

    def plan(self, step: StepInfo) -> np.ndarray:
        most = step.max_draft_tokens
        if not most.any():
            return most  # which says nothing about whether drafts pay
        if self._verified:
            confidence, *verified = zip(*self._verified, strict=True)
            self._verified = []
            self.acceptance.observe(np.stack(confidence), *map(np.array, verified))
        plan = best_plan(step, self.acceptance.by_depth, self.costs)
        by_stopping = max(self._stopping_gain, 0.0)  # without drafts it is one token
        is_enough = self._probing.is_enough(plan.gain + by_stopping)
        if not is_enough and not self._probing.is_idle:
            # Idle only if drafts would not pay even were acceptance better than
            # estimated: an idle engine learns nothing.
            plan = best_plan(step, self.acceptance.hoped_for(), self.costs)
        self._step, self._plan = step, plan
        gain = plan.gain + by_stopping
        self.feeds_prompts = self._probing.pays(gain, step.num_sampling)
        if self.feeds_prompts:
            lens = np.where(plan.may_draft, most, 0)
            self.needs_confidence = self._asks()
            if not self.needs_confidence:
                lens = np.minimum(lens, plan.depth)
        else:
            lens = self._probe(step, plan)
            self.needs_confidence = self._uses_confidence
        if self.needs_confidence:
            self._set_thresholds(plan, len(most))
        return lens

    def _asks(self) -> bool:
        """Whether to stop by confidence: as what it gains says, but now and then the
        other way, to learn it."""
        self._num_plans += 1
        pays = self._stopping_gain >= 0
        is_trial = self._num_plans % (_CONTROL_STEPS if pays else _SURVEY_STEPS) == 0
        return self._uses_confidence and pays != is_trial

    def _set_thresholds(self, plan: Plan, num_reqs: int) -> None:
        """In tokens at the plan's rate: what it costs to verify a draft, to make and
        verify one, and to run a forward for them."""
        rate = plan.tokens_per_ms
        self._verify_cost = rate * plan.verify_ms
        self._draft_cost = rate * (plan.verify_ms + plan.draft_ms)
        self._forward_cost = rate * (plan.forward_ms + self.costs.confidence_ms)
        self._confidence = np.tile(self._unknown, (num_reqs, 1))
        self._survival = np.zeros_like(self._confidence)

    def _probe(self, step: StepInfo, plan: Plan) -> np.ndarray:
        """A few drafts of the request that is cheapest to try, if it is time."""
        most, draft = step.max_draft_tokens, self.costs.draft
        missing = np.where(most > 0, step.missing_rows, np.iinfo(np.int64).max)
        request = int(missing.argmin())
        probe_ms = draft.at(int(missing[request])) + draft.at(1)
        probe_ms += self.costs.speculation_ms + _PROBE_LENGTH * plan.verify_ms
        step_ms = step.num_sampling / max(plan.tokens_per_ms, _LEAST_MS)
        lens = np.zeros_like(most)
        if self._probing.is_due(probe_ms, step_ms):
            self.acceptance.doubt()
            lens[request] = min(_PROBE_LENGTH, int(most[request]))
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
        may = self._step.max_draft_tokens[req_indices] > position + 1
        if self._probing.is_idle or not may.any():
            return np.asarray(may)
        gain = survival * self.acceptance.by_depth[position + 1] - self._draft_cost
        pays = may & (gain > 0)
        return pays & bool(gain[pays].sum() > self._forward_cost)

    def trim(self, draft_lens: np.ndarray) -> np.ndarray:
        if not self.needs_confidence or not draft_lens.any():
            return draft_lens
        kept = draft_lens
        if not self._probing.is_idle:
            kept = self._kept() if self._may_trim else kept
            if self._num_plans % _GAIN_STEPS == 0:
                self._measure_gain(draft_lens, kept)
        for i in np.flatnonzero(draft_lens):
            if kept[i]:
                self._made[self._step.req_ids[i]] = self._confidence[i]
            else:
                self._verified.append((self._confidence[i], 0, 0))
        return kept

    def _kept(self) -> np.ndarray:
        """The drafts worth their rows, and the likeliest others in rows that would be
        padding. [num_reqs] int64"""
        pays = self._survival > self._verify_cost
        rows = self._plan.rows + int(pays.sum())
        room = self.costs.computed_rows(rows) - rows
        # The next step may not have the rows of this one's prompts.
        if room > 0 and not self._step.num_prefill_rows:
            left = np.where(pays, 0.0, self._survival)
            likeliest = np.argsort(-left, axis=None, kind="stable")
            room = min(room, int(np.count_nonzero(left)))
            pays.flat[likeliest[:room]] = True
        return pays.sum(axis=1)

    def _measure_gain(self, made: np.ndarray, kept: np.ndarray) -> None:
        """What stopping and trimming gained in this step over the plan's depth for all;
        drafts that were not made are taken to do as those of their depth do."""
        plan, costs = self._plan, self.costs
        survival, acceptance = self._survival.copy(), self.acceptance.by_depth
        for depth in range(1, plan.depth):
            guess = survival[:, depth - 1] * acceptance[depth]
            survival[:, depth] = np.where(depth < made, survival[:, depth], guess)
        position = np.arange(len(acceptance))
        by_plan = (made > 0)[:, None] & (position < plan.depth)
        worth = survival - self._verify_cost
        gain = worth[position < kept[:, None]].sum() - worth[by_plan].sum()
        num_more = int(made.sum()) - int(by_plan.sum())
        gain -= num_more * (self._draft_cost - self._verify_cost)
        num_forwards = int(made.max())
        ms = (num_forwards - plan.depth) * plan.forward_ms
        ms += num_forwards * costs.confidence_ms + costs.deciding_ms
        if not plan.depth:  # else the plan has paid for it
            ms += costs.speculation_ms
        gain = float(gain - plan.tokens_per_ms * ms) / int(np.count_nonzero(made))
        self._stopping_gain += _GAIN_RATE * (gain - self._stopping_gain)

    def observe(self, req_id: str, num_drafts: int, num_accepted: int) -> None:
        confidence = self._made.pop(req_id, self._unknown)
        if num_drafts:
            self._verified.append((confidence, num_drafts, num_accepted))
            if num_drafts == num_accepted:
                self._probing.drafts_accepted()

    def observe_step(self, num_drafts: np.ndarray, num_accepted: np.ndarray) -> None:
        confidence = np.tile(self._unknown, (len(num_drafts), 1))
        self.acceptance.observe(confidence, num_drafts, num_accepted)
        if ((num_drafts > 0) & (num_drafts == num_accepted)).any():
            self._probing.drafts_accepted()

    def release(self, req_id: str) -> None:
        self._made.pop(req_id, None)

    def forget_drafts(self) -> None:
        """What became of the drafts made so far will not be observed."""
        self._made.clear()
