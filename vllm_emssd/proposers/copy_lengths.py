"""How many drafts are verified where making them costs nothing, as with copies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vllm_emssd.draft_length.acceptance import MAX_ACCEPTANCE, Calibration
from vllm_emssd.draft_length.cost import StepCosts
from vllm_emssd.draft_length.policy import StepInfo

_PROBE_STEPS = 32  # between two tries while no copy is worth its rows
_LEAST_MS = 1e-6


class LengthsByAcceptance:
    """Spends rows of the target on the likeliest drafts.

    Args:
        costs: refreshed by the caller; None to verify all drafts in full.
        check_agreement: is shown each decision; raises where another rank decided
            differently.
    """

    def __init__(
        self,
        costs: StepCosts | None = None,
        check_agreement: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        self._costs = costs
        self._check_agreement = check_agreement
        self._num_idle = 0  # steps in which no draft was worth its row

    def choose(self, step: StepInfo, acceptance: np.ndarray) -> np.ndarray:
        """How many drafts of each request are verified. To be asked once a step.

        Args:
            step: its `max_draft_tokens` say how many there are.
            acceptance: [num_reqs, longest] chance of each draft, once all before it
                are accepted.

        Returns: [num_reqs] int64.
        """
        lens = step.max_draft_tokens
        if self._costs is not None and lens.any():
            lens = self._choose(step, acceptance, self._costs)
        if self._check_agreement is not None:
            self._check_agreement(lens)
        return lens

    def _choose(
        self, step: StepInfo, acceptance: np.ndarray, costs: StepCosts
    ) -> np.ndarray:
        is_draft = np.arange(acceptance.shape[1]) < step.max_draft_tokens[:, None]
        gains = np.minimum(acceptance, MAX_ACCEPTANCE).cumprod(axis=1) * is_draft
        lens = self._best(step, gains, costs)
        self._num_idle = 0 if lens.any() else self._num_idle + 1
        if self._num_idle == _PROBE_STEPS:
            self._num_idle = 0
            lens[int(gains[:, 0].argmax())] = 1
        return lens

    def _best(self, step: StepInfo, gains: np.ndarray, costs: StepCosts) -> np.ndarray:
        """Of each number of rows the best use is that on the highest gains, which gives
        every request a prefix; all numbers are compared. Rows that would be padding
        are used too. [num_reqs] int64"""
        flat = gains.ravel()
        order = np.argsort(-flat, kind="stable")[: np.count_nonzero(flat)]
        rows = step.base_rows + np.arange(order.size + 1)
        target_ms = costs.target.ms(rows)
        ms = costs.fixed_ms + costs.target.at(step.num_sampling)
        ms += target_ms - target_ms[0]
        ms[1:] += costs.copying_ms
        tokens = np.concatenate([[0.0], flat[order].cumsum()]) + step.num_sampling
        num_rows = int((tokens / np.maximum(ms, _LEAST_MS)).argmax())
        if num_rows and not step.num_prefill_rows:  # which the next step may not have
            num_rows = costs.computed_rows(step.base_rows + num_rows) - step.base_rows
        requests = order[:num_rows] // gains.shape[1]
        return np.bincount(requests, minlength=len(gains))


class CopyLengths(LengthsByAcceptance):
    """The same for proposers that do not know the acceptance of their drafts. They give
    a confidence from 0 to 1; how often drafts of about that confidence are accepted is
    learned."""

    def __init__(
        self,
        costs: StepCosts | None = None,
        check_agreement: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        super().__init__(costs, check_agreement)
        self._calibration = Calibration()
        self._verified: dict[str, np.ndarray] = {}  # confidences that wait for it

    def _choose(
        self, step: StepInfo, confidence: np.ndarray, costs: StepCosts
    ) -> np.ndarray:
        acceptance = self._calibration.acceptance(confidence, confidence)
        lens = super()._choose(step, acceptance, costs)
        for i in np.flatnonzero(lens):
            self._verified[step.req_ids[i]] = confidence[i, : lens[i]]
        return lens

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        """The target verified the first of a request's drafts; 0 where it verified
        none, or those of another proposer."""
        confidence = self._verified.pop(req_id, None)
        if confidence is not None and num_draft_tokens:
            tested = confidence[:num_draft_tokens][: num_accepted_tokens + 1]
            is_accepted = np.arange(tested.size) < num_accepted_tokens
            self._calibration.observe(tested, is_accepted)

    def release(self, req_id: str) -> None:
        """Forget a finished request."""
        self._verified.pop(req_id, None)
