"""`draft_length: "auto"`: as many drafts as earn more than they cost, 0 included."""

from __future__ import annotations

from itertools import compress

import numpy as np

from vllm_emssd.draft_length.anticipation import Anticipation
from vllm_emssd.draft_length.catch_up import CatchUps
from vllm_emssd.draft_length.goodput import (
    Plan,
    StepCosts,
    get_ready,
    plan,
    plan_copies,
    verified_lengths,
    worth_another_forward,
)
from vllm_emssd.draft_length.idleness import Idleness
from vllm_emssd.draft_length.pace import Pace
from vllm_emssd.draft_length.planned_batch import PlannedBatch
from vllm_emssd.draft_length.policy import Copies, DraftOpportunity
from vllm_emssd.draft_length.survival import Survival

_PROBE_LENGTH = 2
_OPTIMISM = 1.0  # standard errors that count as "may well"
_SURE = 8.0  # drafts seen before all catch up on what they missed in idle time
_PLAN_STEPS = 4  # that a plan holds for while the batch stays as it is,
_PLANS_HOLD_FROM = 48.0  # drafts seen: until then each step teaches too much


class AutoDraftLength:
    """Plans each step by goodput and stops a request's drafts by their confidence.

    When nothing pays the drafter is not run, except for a rare probe: a few drafts of
    the request that is cheapest to catch up, so that a change for the better is seen.

    Args:
        costs: prices, refreshed by the caller.
        survival: acceptance, learned from what is verified.
        may_trim: False where drafts are sampled: a later draft's probability must not
            decide whether an earlier one is kept.
    """

    needs_confidence = True

    def __init__(self, costs: StepCosts, survival: Survival, may_trim: bool) -> None:
        self.costs = costs
        self._survival_model = survival
        self._pace = Pace()
        self._anticipation = Anticipation(survival.num_speculative_tokens)
        self._may_trim = may_trim
        self._tokens_per_ms = 0.0
        self._confidences: dict[str, np.ndarray] = {}  # of drafts not yet verified
        self._idleness = Idleness()
        self._catch_ups = CatchUps()
        self._num_rested = 0  # steps since the last plan
        self._is_probe = False
        self._chooses = False  # among copies: `choose` is asked, not `begin`
        self._planned: PlannedBatch | None = None
        get_ready()

    @property
    def feeds_prompts(self) -> bool:
        """Prompts are fed along while speculation pays, else by catch-up later."""
        return self._idleness.num_steps == 0

    def rests(self, num_tokens_anyway: float) -> bool:
        if not self._idleness.dozes:
            return False
        if num_tokens_anyway:
            self._idleness.count(self._ms_for(num_tokens_anyway))
            self._num_rested += 1
        return True

    def begin(self, step: DraftOpportunity) -> np.ndarray:
        if self._idleness.dozes:
            return self._doze(step)
        if not step.max_draft_tokens.any():
            return self._sit_out(step)
        planned = self._planned
        if planned is not None and planned.holds_for(step, self._most_missing):
            drafts = self._go_by(planned, step)
        else:
            drafts = self._plan_anew(step)
        if not self._is_probe:
            self._catch_ups.observe(compress(step.req_ids, drafts))
        self._num_made = 0
        self._real = np.zeros_like(self._expected)  # survival of the drafts made
        self._confidence = np.zeros_like(self._expected)
        self._confidences.update(
            (step.req_ids[i], self._confidence[i]) for i in np.flatnonzero(drafts)
        )
        most = np.minimum(self._most, _PROBE_LENGTH) if self._is_probe else self._most
        return np.where(drafts, most, 0)

    @property
    def _most_missing(self) -> int:
        """Rows that the drafter lacks of who drafted a step ago."""
        return self._survival_model.num_speculative_tokens + 1

    def _plan_anew(self, step: DraftOpportunity) -> np.ndarray:
        """Who drafts. [num_reqs] bool"""
        self._has_planned = True
        survival = self._survival_model
        if self._num_rested:
            survival.skip(step.req_ids, self._num_rested)
            self._num_rested = 0
        self._take_in(step)
        self._expected = survival.expected(self._factors.by_position)
        self._acceptance = survival.acceptance_by_position(self._factors.by_position)
        lens = self._plan(step, self._expected)
        drafts = lens > 0
        if step.copies is not None:
            self._base_rows -= int(step.copies.rows[drafts].sum())
        self._verify_ms = self._verify_prices(int(lens.sum()))
        survival.skip(compress(step.req_ids, ~drafts))
        self._planned = None
        holds = drafts.any() and survival.num_tested >= _PLANS_HOLD_FROM
        if holds and not self._is_probe:
            self._planned = PlannedBatch(
                list(step.req_ids),
                step.is_sampling.copy(),
                step.num_rows_anyway,
                drafts,
                _PLAN_STEPS - 1,
            )
        return drafts

    def _verify_prices(self, num_planned: int) -> np.ndarray:
        """The target's, with 0 to all possible drafts: up to those planned each costs
        the average, so that a stair which pays as a whole is climbed; beyond, convex.
        [num_reqs * K + 1]"""
        planned = self._base_rows + num_planned
        last = self._base_rows + self._expected.size
        beyond = self.costs.target.convex(planned, last)
        base_ms = self.costs.target.at(self._base_rows)
        within = np.linspace(base_ms, beyond[0], num_planned + 1)
        return np.concatenate([within, beyond[1:]])

    def _go_by(self, planned: PlannedBatch, step: DraftOpportunity) -> np.ndarray:
        """As planned; what was verified since waits for the next plan."""
        self._has_planned = False
        planned.num_steps_left -= 1
        self._most = step.max_draft_tokens
        self._survival_model.skip(compress(step.req_ids, ~planned.drafts))
        return planned.drafts & (self._most > 0)

    def choose(self, step: DraftOpportunity, confidence: np.ndarray) -> np.ndarray:
        self._chooses = True
        if not step.max_draft_tokens.any():
            return np.zeros_like(step.max_draft_tokens)
        self._take_in(step)
        factors = np.broadcast_to(
            self._factors.by_confidence[:, None], confidence.shape
        )
        accepted = self._survival_model.acceptance(confidence, factors)
        lens = self._plan(step, np.cumprod(accepted, axis=1))
        skipped = np.flatnonzero((lens == 0) & (step.max_draft_tokens > 0))
        self._survival_model.skip(step.req_ids[i] for i in skipped)
        self._confidences.update(
            (step.req_ids[i], confidence[i]) for i in np.flatnonzero(lens)
        )
        return lens

    def _sit_out(self, step: DraftOpportunity) -> np.ndarray:
        """Nobody may draft, which says nothing about whether drafts pay."""
        self._survival_model.skip(step.req_ids)
        return np.zeros_like(step.max_draft_tokens)

    def _doze(self, step: DraftOpportunity) -> np.ndarray:
        if step.max_draft_tokens.any():
            self._idleness.count(self._step_ms(step))
            self._survival_model.skip(step.req_ids)
        return np.zeros_like(step.max_draft_tokens)

    def _step_ms(self, step: DraftOpportunity) -> float:
        return self._ms_for(float(step.num_tokens_anyway.sum()))

    def _ms_for(self, num_tokens: float) -> float:
        """What so many tokens take, by the last plan; 0 before there was one."""
        return num_tokens / self._tokens_per_ms if self._tokens_per_ms else 0.0

    def _take_in(self, step: DraftOpportunity) -> None:
        self._req_ids = step.req_ids
        self._most = step.max_draft_tokens
        self._factors = self._survival_model.request_factors(step.req_ids)
        num_sampling = int(step.is_sampling.sum())
        self._base_rows = step.num_rows_anyway
        self._row_ms, draft_ms, step_ms = self._request_ms(num_sampling)
        self._worth = self._pace.worth(step.req_ids, step_ms, self._row_ms, draft_ms)
        self._given_up = None if step.copies is None else step.copies.worth(self._worth)

    def _request_ms(self, num_sampling: int) -> tuple[float, float, float]:
        """A request's share where each drafts one: of the rows that verify, of the
        drafter's, and of a step without drafts."""
        num_reqs = max(num_sampling, 1)
        target, draft = self.costs.target, self.costs.draft
        once, twice = target.at(num_reqs), target.at(2 * num_reqs)
        step_ms = once + self.costs.fixed_ms
        return (
            (twice - once) / num_reqs,
            draft.at(num_reqs) / num_reqs,
            step_ms / num_reqs,
        )

    def _plan(self, step: DraftOpportunity, survival: np.ndarray) -> np.ndarray:
        best = self._best(step, survival)
        self._tokens_per_ms = best.tokens_per_ms
        self._is_probe = False
        pays = bool(best.draft_lens.any())
        is_sure = self.feeds_prompts or self._survival_model.num_tested >= _SURE
        if pays and is_sure:
            self._idleness.take_in(best.gain, self._step_ms(step))
            return best.draft_lens
        self._idleness.take_in(0.0, self._step_ms(step))
        return self._maybe_probe(step)

    def _best(self, step: DraftOpportunity, survival: np.ndarray) -> Plan:
        may_draft = np.arange(survival.shape[1]) < self._most[:, None]
        gains = np.where(may_draft, survival * self._worth[:, None], 0.0)
        base_tokens = float(self._worth @ step.num_tokens_anyway)
        if self._chooses:
            return plan_copies(
                gains,
                step.num_rows_anyway - step.num_prefill_rows,
                step.num_prefill_rows,
                self.costs,
                base_tokens,
            )
        rows = None
        if self._may_trim:
            gains, rows = self._anticipation.gains_and_rows(
                gains, self._tokens_per_ms * self._row_ms
            )
        return plan(
            gains,
            step.missing_rows,
            int(step.is_sampling.sum()),
            step.num_prefill_rows,
            self.costs,
            base_tokens,
            rows,
            self._given_up,
            self._catch_ups.num_steps,
        )

    def _maybe_probe(self, step: DraftOpportunity) -> np.ndarray:
        lens = np.zeros_like(self._most)
        costs = np.where(self._most > 0, self._probe_ms(step.missing_rows), np.inf)
        request = int(costs.argmin())
        probe_ms = float(costs[request])
        if not self._idleness.may_probe(probe_ms):
            return lens
        is_hopeful = self._may_well_pay(step)
        if not (is_hopeful or self._idleness.must_probe(probe_ms)):
            return lens
        if not is_hopeful:
            self._survival_model.doubt()
            self._catch_ups.start_over()
        self._idleness.start_over()
        self._is_probe = True
        lens[request] = min(_PROBE_LENGTH, int(self._most[request]))
        return lens

    def _probe_ms(self, missing_rows: np.ndarray) -> np.ndarray:
        """What it would take to try each request. [num_reqs]"""
        draft, target, rows = self.costs.draft, self.costs.target, self._base_rows
        verify_ms = target.at(rows + _PROBE_LENGTH) - target.at(rows)
        if self._chooses:
            return np.full(len(missing_rows), verify_ms)
        probe_ms = draft.ms(missing_rows) + (draft.at(1) + verify_ms)
        if self._given_up is not None and self._tokens_per_ms:
            probe_ms += self._given_up.gains / self._tokens_per_ms
        return probe_ms

    def _may_well_pay(self, step: DraftOpportunity) -> bool:
        hoped = self._survival_model.expected(self._factors.by_position, _OPTIMISM)
        return bool(self._best(step, hoped).draft_lens.any())

    def go_on(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        assert confidence is not None
        if len(req_indices) == 1:
            return self._goes_on_alone(
                int(req_indices[0]), float(confidence[0]), position
            )
        accepted = self._survival_model.acceptance(
            confidence, self._factors.by_confidence[req_indices]
        )
        if position:
            accepted *= self._real[req_indices, position - 1]
        self._real[req_indices, position] = accepted
        self._confidence[req_indices, position] = confidence
        self._num_made += len(req_indices)
        may: np.ndarray = self._most[req_indices] > position + 1
        if self._is_probe or position + 1 == self._real.shape[1]:
            return may
        gains = accepted * self._worth[req_indices]
        gains *= self._acceptance[req_indices, position + 1]
        return may & worth_another_forward(
            np.where(may, gains, 0.0),
            self.costs.draft,
            self._verify_ms[self._num_made :],
            self._tokens_per_ms,
        )

    def _goes_on_alone(
        self, request: int, confidence: float, position: int
    ) -> np.ndarray:
        """`go_on` of one request in plain numbers: with few requests, steps are short
        and calls of numpy's a share of them."""
        accepted = self._survival_model.acceptance_of_one(
            confidence, self._factors.by_confidence.item(request)
        )
        if position:
            accepted *= self._real.item(request, position - 1)
        self._real[request, position] = accepted
        self._confidence[request, position] = confidence
        self._num_made += 1
        goes_on = self._most.item(request) > position + 1
        if goes_on and not (self._is_probe or position + 1 == self._real.shape[1]):
            gain = accepted * self._worth.item(request)
            gain *= self._acceptance.item(request, position + 1)
            before, after = self._verify_ms[self._num_made : self._num_made + 2]
            ms = self.costs.draft.at(1) + float(after - before)
            goes_on = gain > self._tokens_per_ms * ms
        return np.array([goes_on])

    def finish(self, draft_lens: np.ndarray) -> np.ndarray:
        if not self._may_trim or not draft_lens.any():
            return draft_lens
        if self._has_planned:
            drafted = draft_lens > 0
            self._anticipation.observe(self._expected[drafted], self._real[drafted])
        if self._is_probe:
            return draft_lens
        worth = verified_lengths(
            self._real * self._worth[:, None],
            self._base_rows,
            self.costs.target,
            self._tokens_per_ms,
        )
        kept = np.minimum(draft_lens, worth)
        if self._given_up is not None:
            kept = np.where(self._would_copy(kept, self._given_up), 0, kept)
        for i in np.flatnonzero(kept < draft_lens):
            self._survival_model.observe_trimmed(
                self._req_ids[i],
                int(kept[i]),
                self._confidence[i, kept[i] : draft_lens[i]],
            )
        return kept

    def _would_copy(self, kept: np.ndarray, copies: Copies) -> np.ndarray:
        """Now that drafts are made and known, whose copy is worth more. [num_reqs]"""
        gains = self._real * self._worth[:, None]
        drafted = (gains * (np.arange(gains.shape[1]) < kept[:, None])).sum(axis=1)
        more_ms = self._row_ms * (copies.rows - kept)
        more = copies.gains - drafted - self._tokens_per_ms * more_ms
        return np.asarray((copies.rows > 0) & (more > 0))

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        num_tokens = num_accepted_tokens + 1
        self._pace.observe(req_id, num_draft_tokens, num_tokens, self._chooses)
        confidences = self._confidences.pop(req_id, None)
        if confidences is not None:
            self._survival_model.observe(
                req_id, confidences[:num_draft_tokens], num_accepted_tokens
            )

    def observe_others(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        """In a mixed batch the others' are the copies where these are not."""
        num_tokens = num_accepted_tokens + 1
        self._pace.observe(req_id, num_draft_tokens, num_tokens, not self._chooses)
        self._confidences.pop(req_id, None)

    def release(self, req_id: str) -> None:
        self._confidences.pop(req_id, None)
        self._survival_model.release(req_id)
        self._pace.release(req_id)
