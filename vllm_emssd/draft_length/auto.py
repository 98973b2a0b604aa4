"""`draft_length: "auto"`: as many drafts as earn more than they cost, 0 included."""

from __future__ import annotations

import numpy as np

from vllm_emssd.draft_length.goodput import (
    StepCosts,
    plan,
    verified_lengths,
    worth_another_forward,
)
from vllm_emssd.draft_length.policy import DraftOpportunity
from vllm_emssd.draft_length.survival import Survival

_FIRST_PROBE = 16  # idle steps before the first probe; doubles up to
_RAREST_PROBE = 256
_PROBE_LENGTH = 2


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
        self._may_trim = may_trim
        self._tokens_per_ms = 0.0
        self._confidences: dict[str, list[float]] = {}
        self._idle_steps = 0
        self._probe_after = _FIRST_PROBE
        self._is_probe = False

    @property
    def feeds_prompts(self) -> bool:
        """Prompts are fed along while speculation pays, else by catch-up later."""
        return self._idle_steps == 0

    def begin(self, step: DraftOpportunity) -> np.ndarray:
        self._take_in(step)
        expected = self._survival_model.expected(self._factors)
        self._real = np.zeros_like(expected)  # survival of the drafts made
        lens = self._plan(step, expected)
        return lens if self._is_probe else np.where(lens > 0, self._most, 0)

    def choose(self, step: DraftOpportunity, confidence: np.ndarray) -> np.ndarray:
        self._take_in(step)
        factors = np.broadcast_to(self._factors[:, None], confidence.shape)
        accepted = self._survival_model.acceptance(confidence, factors)
        lens = self._plan(step, np.cumprod(accepted, axis=1))
        for i in np.flatnonzero(lens):
            self._confidences[step.req_ids[i]] = confidence[i, : lens[i]].tolist()
        return lens

    def _take_in(self, step: DraftOpportunity) -> None:
        self._req_ids = step.req_ids
        self._most = step.max_draft_tokens
        self._factors = self._survival_model.request_factors(step.req_ids)
        self._base_rows = int(step.is_sampling.sum()) + step.num_prefill_rows

    def _plan(self, step: DraftOpportunity, survival: np.ndarray) -> np.ndarray:
        positions = np.arange(survival.shape[1])
        possible = np.where(positions < self._most[:, None], survival, 0.0)
        best = plan(possible, step.missing_rows, self._base_rows, self.costs)
        self._tokens_per_ms = best.tokens_per_ms
        self._is_probe = False
        if best.draft_lens.any():
            self._idle_steps, self._probe_after = 0, _FIRST_PROBE
            return best.draft_lens
        return self._maybe_probe(step)

    def _maybe_probe(self, step: DraftOpportunity) -> np.ndarray:
        lens = np.zeros_like(self._most)
        self._idle_steps += 1
        if self._idle_steps < self._probe_after or not self._most.any():
            return lens
        self._idle_steps = 1
        self._probe_after = min(2 * self._probe_after, _RAREST_PROBE)
        self._is_probe = True
        cheapest = np.where(self._most > 0, step.missing_rows, np.iinfo(np.int64).max)
        request = int(cheapest.argmin())
        lens[request] = min(_PROBE_LENGTH, int(self._most[request]))
        return lens

    def go_on(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        assert confidence is not None
        factors = self._factors[req_indices]
        accepted = self._survival_model.acceptance(confidence, factors)
        before = self._real[req_indices, position - 1] if position else 1.0
        self._real[req_indices, position] = before * accepted
        for i, value in zip(req_indices, confidence.tolist(), strict=True):
            kept = self._confidences.setdefault(self._req_ids[i], [])
            del kept[position:]
            kept.append(value)
        may: np.ndarray = self._most[req_indices] > position + 1
        if self._is_probe or position + 1 == self._real.shape[1]:
            return may
        next_acceptance = np.where(
            may, self._survival_model.next_acceptance(factors, position + 1), 0.0
        )
        verify_rows = self._base_rows + int((self._real > 0).sum())
        may &= worth_another_forward(
            self._real[req_indices, position],
            next_acceptance,
            verify_rows,
            self.costs,
            self._tokens_per_ms,
        )
        return may

    def finish(self, draft_lens: np.ndarray) -> np.ndarray:
        if not self._may_trim or self._is_probe:
            return draft_lens
        worth = verified_lengths(
            self._real, self._base_rows, self.costs.target, self._tokens_per_ms
        )
        return np.minimum(draft_lens, worth)

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        confidences = self._confidences.pop(req_id, [])[:num_draft_tokens]
        self._survival_model.observe(req_id, confidences, num_accepted_tokens)

    def release(self, req_id: str) -> None:
        self._confidences.pop(req_id, None)
        self._survival_model.release(req_id)
