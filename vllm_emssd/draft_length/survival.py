"""How likely a draft is accepted, learned from those that were verified.

A draft carries a *confidence*: the drafter's highest probability where it was made.
Its acceptance is estimated from drafts of like confidence (pooled), times a factor of
the request's own. What is known before drafting is the acceptance by position, again
pooled and times a factor of the request's own: another one, as a request may fare just
as its confidences say and yet far better or worse than the others. All forget.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_NUM_BINS = 16
_LOGIT_RANGE = (-3.0, 7.0)
_PRIOR_TESTS = 4.0  # verified drafts that a starting guess is worth
_PRIOR_ACCEPTANCE = 0.9  # at the start: what is tried is soon known
_FORGET = 0.995  # weight kept by all earlier drafts at each new one
_LEARN_FIRST = 64  # first drafts, before the starting guess is given up
_DOUBT = 0.7  # the weight kept after a long time without any
_DOUBT_DOWN_TO = 16.0  # tests of like confidence, or bare confidence would be believed
_REQUEST_PRIOR = 8.0  # drafts before a request's own record counts as much as the pool
_REQUEST_FORGET = 0.97
_IDLE_FORGET = 0.98  # of a request's record, each step in which it does not draft
_BOUNDS = (0.005, 0.995)


def _bin_of(confidence: np.ndarray) -> np.ndarray:
    p = np.clip(confidence, 1e-6, 1 - 1e-6)
    low, high = _LOGIT_RANGE
    scaled = (np.log(p / (1 - p)) - low) / (high - low) * _NUM_BINS
    return np.clip(scaled.astype(np.int64), 0, _NUM_BINS - 1)


@dataclass(slots=True)
class _Record:
    """Of one request: drafts accepted, and how many would be of an average one's."""

    accepted: float = 0.0
    by_confidence: float = 0.0
    by_position: float = 0.0

    def fade(self, keep: float) -> None:
        self.accepted *= keep
        self.by_confidence *= keep
        self.by_position *= keep

    def factor(self, expected: float) -> float:
        return (self.accepted + _REQUEST_PRIOR) / (expected + _REQUEST_PRIOR)


@dataclass(frozen=True, slots=True)
class _News:
    """Drafts of one request, and what became of them. All [num_drafts]."""

    req_id: str
    position: np.ndarray
    confidence: np.ndarray
    outcome: np.ndarray  # 1.0 accepted, 0.0 not; what was expected if never verified
    is_verified: bool


@dataclass(frozen=True, slots=True)
class RequestFactors:
    """How much better than the pool each request's drafts fare. [num_reqs] float"""

    by_confidence: np.ndarray
    by_position: np.ndarray


class Survival:
    """Acceptance probabilities, calibrated online.

    Args:
        num_speculative_tokens: K, the most drafts of a request.
    """

    def __init__(self, num_speculative_tokens: int) -> None:
        self._by_confidence = np.zeros((2, _NUM_BINS))  # [accepted | tested, bin]
        self._by_position = np.zeros((2, num_speculative_tokens))
        self._by_position[:, 0] = _PRIOR_TESTS * _PRIOR_ACCEPTANCE, _PRIOR_TESTS
        self._num_first_drafts = 0
        self._requests: dict[str, _Record] = {}
        self._news: list[_News] = []

    def acceptance(self, confidence: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Chance that each draft is accepted once all before it are.

        Shapes: all alike, float; `factor` from `request_factors`, by confidence.
        """
        self._take_in_news()
        return np.clip(self._pooled(confidence) * factor, *_BOUNDS)

    def expected(self, factor: np.ndarray, optimism: float = 0.0) -> np.ndarray:
        """Survival by position, before anything is drafted. [num_reqs, K]

        Args:
            factor: [num_reqs] from `request_factors`, by position.
            optimism: standard errors to add to what was learned.
        """
        self._take_in_news()
        pooled = self._pooled_by_position()
        if self._num_first_drafts < _LEARN_FIRST:
            pooled = np.maximum(pooled, _PRIOR_ACCEPTANCE)
        elif optimism:
            tested = self._by_position[1] + _PRIOR_TESTS
            pooled = pooled + optimism * np.sqrt(pooled * (1 - pooled) / tested)
        alpha = np.clip(np.outer(factor, pooled), *_BOUNDS)
        return np.cumprod(alpha, axis=1)

    def next_acceptance(self, factor: np.ndarray, position: int) -> np.ndarray:
        """Chance that a draft not yet made would be accepted. [num_reqs]"""
        self._take_in_news()
        return np.clip(factor * self._pooled_by_position()[position], *_BOUNDS)

    def request_factors(self, req_ids: Sequence[str]) -> RequestFactors:
        self._take_in_news()
        average = _Record()
        records = [self._requests.get(r, average) for r in req_ids]
        return RequestFactors(
            np.array([r.factor(r.by_confidence) for r in records], np.float64),
            np.array([r.factor(r.by_position) for r in records], np.float64),
        )

    def observe(
        self, req_id: str, confidences: np.ndarray, num_accepted_tokens: int
    ) -> None:
        """The target verified drafts of these confidences and accepted a prefix."""
        num_tested = min(num_accepted_tokens + 1, len(confidences))
        if num_tested:
            position = np.arange(num_tested)
            outcome = (position < num_accepted_tokens).astype(np.float64)
            seen = confidences[:num_tested]
            self._news.append(_News(req_id, position, seen, outcome, True))

    def observe_trimmed(
        self, req_id: str, position: np.ndarray, confidences: np.ndarray
    ) -> None:
        """Drafts at these positions turned out too unlikely to verify: expect that of
        the next ones. (Else what is drafted and trimmed would be drafted for ever.)"""
        record = self._requests.get(req_id, _Record())
        factor = record.factor(record.by_confidence)
        outcome = np.clip(self._pooled(confidences) * factor, *_BOUNDS)
        self._news.append(_News(req_id, position, confidences, outcome, False))

    @property
    def num_tested(self) -> float:
        """First drafts that the estimates rest on, old ones counting less."""
        self._take_in_news()
        return float(self._by_position[1, 0])

    def skip(self, req_ids: Iterable[str]) -> None:
        """These do not draft: let them sink back towards the pool, to be tried again
        in the end."""
        self._take_in_news()
        for req_id in req_ids:
            if req_id in self._requests:
                self._requests[req_id].fade(_IDLE_FORGET)

    def doubt(self) -> None:
        """Nothing was drafted for long: what comes next counts for more."""
        self._take_in_news()
        tested = np.maximum(self._by_confidence[1], _DOUBT_DOWN_TO)
        self._by_confidence *= np.maximum(_DOUBT, _DOUBT_DOWN_TO / tested)
        self._by_position *= _DOUBT

    def release(self, req_id: str) -> None:
        self._take_in_news()
        self._requests.pop(req_id, None)

    def _pooled(self, confidence: np.ndarray) -> np.ndarray:
        accepted, tested = self._by_confidence[:, _bin_of(confidence)]
        pooled = (accepted + _PRIOR_TESTS * confidence) / (tested + _PRIOR_TESTS)
        return np.asarray(pooled)

    def _pooled_by_position(self) -> np.ndarray:
        """A position little is known about is taken to be like the one before. [K]"""
        estimates: list[float] = []
        for accepted, tested in self._by_position.T.tolist():
            prior = _PRIOR_TESTS if estimates else 0.0
            like = estimates[-1] if estimates else 0.0
            estimates.append((accepted + prior * like) / (tested + prior))
        return np.array(estimates)

    def _take_in_news(self) -> None:
        """All of a step's verified drafts at once, judged by what was known before."""
        if not self._news:
            return
        news, self._news = self._news, []
        confidence = np.concatenate([n.confidence for n in news])
        position = np.concatenate([n.position for n in news])
        outcome = np.concatenate([n.outcome for n in news])
        counts = [len(n.position) for n in news]
        starts = np.cumsum([0, *counts[:-1]])
        by_confidence = self._pooled(confidence)
        by_position = self._pooled_by_position()[position]
        sums = np.add.reduceat([outcome, by_confidence, by_position], starts, axis=1)
        for n, sum_of in zip(news, sums.T.tolist(), strict=True):
            record = self._requests.setdefault(n.req_id, _Record())
            record.accepted += sum_of[0]
            record.by_confidence += sum_of[1]
            record.by_position += sum_of[2]
            record.fade(_REQUEST_FORGET ** len(n.position))
        is_verified = np.repeat([n.is_verified for n in news], counts)
        self._by_confidence *= _FORGET ** int(is_verified.sum())
        bins = _bin_of(confidence)
        _count(self._by_confidence, bins[is_verified], outcome[is_verified])
        num_positions = self._by_position.shape[1]
        self._by_position *= _FORGET ** np.bincount(position, minlength=num_positions)
        _count(self._by_position, position, outcome)
        self._num_first_drafts += int((position == 0).sum())


def _count(table: np.ndarray, index: np.ndarray, outcome: np.ndarray) -> None:
    """Add outcomes to [accepted | tested, index]."""
    size = table.shape[1]
    table[0] += np.bincount(index, weights=outcome, minlength=size)
    table[1] += np.bincount(index, minlength=size)
