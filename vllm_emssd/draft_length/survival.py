"""How likely a draft is accepted, learned from those that were verified.

A draft carries a *confidence*: the drafter's highest probability where it was made.
Its acceptance is estimated from drafts of like confidence (pooled), times a factor of
the request's own. What is known before drafting is the acceptance by position, again
pooled and times the request's factor. Both forget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NUM_BINS = 16
_LOGIT_RANGE = (-3.0, 7.0)
_PRIOR_TESTS = 4.0  # verified drafts that a starting guess is worth
_PRIOR_ACCEPTANCE = 0.6  # of a draft nothing is known about
_FORGET = 0.998  # weight kept by all earlier drafts at each new one
_REQUEST_PRIOR = 6.0  # drafts before a request's own record counts as much as the pool
_REQUEST_FORGET = 0.95
_BOUNDS = (0.005, 0.995)


def _bin_of(confidence: np.ndarray) -> np.ndarray:
    p = np.clip(confidence, 1e-6, 1 - 1e-6)
    low, high = _LOGIT_RANGE
    scaled = (np.log(p / (1 - p)) - low) / (high - low) * _NUM_BINS
    return np.clip(scaled.astype(np.int64), 0, _NUM_BINS - 1)


@dataclass(slots=True)
class _Record:
    accepted: float = _REQUEST_PRIOR
    expected: float = _REQUEST_PRIOR


class Survival:
    """Acceptance probabilities, calibrated online.

    Args:
        num_speculative_tokens: K, the most drafts of a request.
    """

    def __init__(self, num_speculative_tokens: int) -> None:
        shape = (2, _NUM_BINS)
        self._by_confidence = np.zeros(shape)  # [accepted | tested, bin]
        self._by_position = np.full((2, num_speculative_tokens), _PRIOR_TESTS)
        self._by_position[0] *= _PRIOR_ACCEPTANCE
        self._requests: dict[str, _Record] = {}

    def acceptance(self, confidence: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Chance that each draft is accepted once all before it are.

        Shapes: all [num_drafts] float; `factor` from `request_factors`.
        """
        bins = _bin_of(confidence)
        accepted, tested = self._by_confidence[:, bins]
        pooled = (accepted + _PRIOR_TESTS * confidence) / (tested + _PRIOR_TESTS)
        return np.clip(pooled * factor, *_BOUNDS)

    def expected(self, factor: np.ndarray) -> np.ndarray:
        """Survival by position, before anything is drafted. [num_reqs, K]"""
        accepted, tested = self._by_position
        alpha = np.clip(np.outer(factor, accepted / tested), *_BOUNDS)
        return np.cumprod(alpha, axis=1)

    def next_acceptance(self, factor: np.ndarray, position: int) -> np.ndarray:
        """Chance that a draft not yet made would be accepted. [num_reqs]"""
        accepted, tested = self._by_position[:, position]
        return np.clip(factor * accepted / tested, *_BOUNDS)

    def request_factors(self, req_ids: Sequence[str]) -> np.ndarray:
        """How much better than the pool each request's drafts fare. [num_reqs]"""
        records = (self._requests.get(r) for r in req_ids)
        return np.array([r.accepted / r.expected if r else 1.0 for r in records])

    def observe(
        self, req_id: str, confidences: Sequence[float], num_accepted_tokens: int
    ) -> None:
        """The target verified drafts of these confidences and accepted a prefix."""
        num_tested = min(num_accepted_tokens + 1, len(confidences))
        if num_tested == 0:
            return
        seen = np.asarray(confidences[:num_tested], dtype=np.float64)
        outcome = np.arange(num_tested) < num_accepted_tokens
        predicted = self.acceptance(seen, np.ones(num_tested))
        keep = _FORGET**num_tested
        self._by_confidence *= keep
        bins = _bin_of(seen)
        np.add.at(self._by_confidence[0], bins, outcome)
        np.add.at(self._by_confidence[1], bins, 1.0)
        self._by_position[:, :num_tested] *= _FORGET
        self._by_position[0, :num_tested] += outcome
        self._by_position[1, :num_tested] += 1.0
        record = self._requests.setdefault(req_id, _Record())
        fade = _REQUEST_FORGET**num_tested
        record.accepted += float(outcome.sum())
        record.expected += float(predicted.sum())
        self._fade(record, fade)

    @staticmethod
    def _fade(record: _Record, keep: float) -> None:
        """Let a request's record sink back towards the pool."""
        record.accepted = _REQUEST_PRIOR + keep * (record.accepted - _REQUEST_PRIOR)
        record.expected = _REQUEST_PRIOR + keep * (record.expected - _REQUEST_PRIOR)

    def release(self, req_id: str) -> None:
        self._requests.pop(req_id, None)
