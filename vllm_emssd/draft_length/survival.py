"""How likely a draft is accepted, learned from those that were verified.

A draft carries a *confidence*: the drafter's highest probability where it was made.
Its acceptance is estimated from drafts of like confidence (pooled), times a factor of
the request's own. What is known before drafting is the acceptance by position, again
pooled and times a factor of the request's own: another one, as a request may fare just
as its confidences say and yet far better or worse than the others. All forget.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
_BIN_EDGES = 1 / (1 + np.exp(-np.linspace(*_LOGIT_RANGE, _NUM_BINS + 1)[1:-1]))
_BIN_EDGE_LIST: list[float] = _BIN_EDGES.tolist()


def _bin_of(confidence: np.ndarray) -> np.ndarray:
    """The logit's, in bins of equal width. Found by the edges, without a logarithm."""
    return np.asarray(np.searchsorted(_BIN_EDGES, confidence, side="right"))


class _Records:
    """Of each request: drafts accepted, and how many would be of an average one's.

    One row a request; row 0 stays empty and stands for requests not seen yet.
    """

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self.values = np.zeros((8, 3))  # [row, accepted | by confidence | by position]

    def find(self, req_ids: Iterable[str]) -> np.ndarray:
        """[num_reqs] int64, 0 for who is not there."""
        return np.array([self._rows.get(r, 0) for r in req_ids], dtype=np.int64)

    def find_or_add(self, req_ids: Iterable[str]) -> np.ndarray:
        return np.array([self._rows.get(r) or self._add(r) for r in req_ids], np.int64)

    def remove(self, req_id: str) -> None:
        row = self._rows.pop(req_id, 0)
        if row:
            self.values[row] = 0.0
            self._free.append(row)

    def factors(self, rows: np.ndarray, expected: int) -> np.ndarray:
        """How much better than expected (column 1 or 2) they fare. [num_reqs]"""
        accepted = self.values[rows, 0] + _REQUEST_PRIOR
        return np.asarray(accepted / (self.values[rows, expected] + _REQUEST_PRIOR))

    def _add(self, req_id: str) -> int:
        row = self._free.pop() if self._free else len(self._rows) + 1
        if row == len(self.values):
            self.values = np.concatenate([self.values, np.zeros_like(self.values)])
        self._rows[req_id] = row
        return row


_BY_CONFIDENCE, _BY_POSITION = 1, 2  # columns of the records
_NEVER_VERIFIED = -1


class _News(NamedTuple):
    """Drafts of one request from a position on, and how many were accepted."""

    req_id: str
    position: int
    confidence: np.ndarray  # [num_drafts]
    num_accepted: int  # or _NEVER_VERIFIED


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
        self._records = _Records()
        self._news: list[_News] = []
        self._position_estimates: np.ndarray | None = None  # until news is taken in

    @property
    def num_speculative_tokens(self) -> int:
        return self._by_position.shape[1]

    def acceptance(self, confidence: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Chance that each draft is accepted once all before it are.

        Shapes: all alike, float; `factor` from `request_factors`, by confidence.
        """
        return _bounded(self._pooled(confidence) * factor)

    def acceptance_of_one(self, confidence: float, factor: float) -> float:
        """The same of one draft."""
        bin_ = bisect_right(_BIN_EDGE_LIST, confidence)
        accepted = self._by_confidence.item(0, bin_) + _PRIOR_TESTS * confidence
        pooled = accepted / (self._by_confidence.item(1, bin_) + _PRIOR_TESTS)
        return min(max(pooled * factor, _BOUNDS[0]), _BOUNDS[1])

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
        alpha = _bounded(factor[:, None] * pooled)
        return np.cumprod(alpha, axis=1)

    def acceptance_by_position(self, factor: np.ndarray) -> np.ndarray:
        """Chance of drafts not yet made, once all before them are accepted, `factor` as
        for `expected`. [num_reqs, K]"""
        return _bounded(factor[:, None] * self._pooled_by_position())

    def request_factors(self, req_ids: Sequence[str]) -> RequestFactors:
        """Takes in what was observed since the last call: estimates change with it."""
        self._take_in_news()
        rows = self._records.find(req_ids)
        return RequestFactors(
            self._records.factors(rows, _BY_CONFIDENCE),
            self._records.factors(rows, _BY_POSITION),
        )

    def observe(
        self, req_id: str, confidences: np.ndarray, num_accepted_tokens: int
    ) -> None:
        """The target verified drafts of these confidences and accepted a prefix."""
        tested = confidences[: num_accepted_tokens + 1]
        if tested.size:
            self._news.append(_News(req_id, 0, tested, num_accepted_tokens))

    def observe_trimmed(
        self, req_id: str, position: int, confidences: np.ndarray
    ) -> None:
        """Drafts from this position on turned out too unlikely to verify: expect that
        of the next ones. (Else what is drafted and trimmed is drafted for ever.)"""
        self._news.append(_News(req_id, position, confidences, _NEVER_VERIFIED))

    @property
    def num_tested(self) -> float:
        """First drafts that the estimates rest on, old ones counting less."""
        self._take_in_news()
        return float(self._by_position[1, 0])

    def skip(self, req_ids: Iterable[str], num_steps: int = 1) -> None:
        """These do not draft: let them sink back towards the pool, to be tried again
        in the end."""
        rows = self._records.find(req_ids)
        if rows.size:
            self._records.values[rows] *= _IDLE_FORGET**num_steps

    def doubt(self) -> None:
        """Nothing was drafted for long: what comes next counts for more."""
        self._take_in_news()
        tested = np.maximum(self._by_confidence[1], _DOUBT_DOWN_TO)
        self._by_confidence *= np.maximum(_DOUBT, _DOUBT_DOWN_TO / tested)
        self._by_position *= _DOUBT
        self._position_estimates = None

    def release(self, req_id: str) -> None:
        self._take_in_news()
        self._records.remove(req_id)

    def _pooled(self, confidence: np.ndarray) -> np.ndarray:
        accepted, tested = self._by_confidence[:, _bin_of(confidence)]
        pooled = (accepted + _PRIOR_TESTS * confidence) / (tested + _PRIOR_TESTS)
        return np.asarray(pooled)

    def _pooled_by_position(self) -> np.ndarray:
        """A position little is known about is taken to be like the one before. [K]"""
        if self._position_estimates is None:
            estimates: list[float] = []
            for accepted, tested in self._by_position.T.tolist():
                prior = _PRIOR_TESTS if estimates else 0.0
                like = estimates[-1] if estimates else 0.0
                estimates.append((accepted + prior * like) / (tested + prior))
            self._position_estimates = np.array(estimates)
        return self._position_estimates

    def _take_in_news(self) -> None:
        """All of a step's verified drafts at once, judged by what was known before."""
        if not self._news:
            return
        req_ids, first, confidences, accepted = zip(*self._news, strict=True)
        self._news = []
        counts = np.array([c.size for c in confidences])
        starts = np.cumsum(counts) - counts
        confidence = np.concatenate(confidences)
        position = np.arange(confidence.size) + np.repeat(
            np.array(first) - starts, counts
        )
        num_accepted = np.repeat(accepted, counts)
        is_verified = num_accepted != _NEVER_VERIFIED
        rows = self._records.find_or_add(req_ids)
        by_confidence = self._pooled(confidence)
        factor = np.repeat(self._records.factors(rows, _BY_CONFIDENCE), counts)
        outcome = np.where(
            is_verified, position < num_accepted, _bounded(by_confidence * factor)
        )
        by_position = self._pooled_by_position()[position]
        sums = np.add.reduceat([outcome, by_confidence, by_position], starts, axis=1)
        np.add.at(self._records.values, rows, sums.T)
        np.multiply.at(self._records.values, rows, _REQUEST_FORGET ** counts[:, None])

        self._by_confidence *= _FORGET ** int(is_verified.sum())
        bins = _bin_of(confidence)
        _count(self._by_confidence, bins[is_verified], outcome[is_verified])
        counted = np.bincount(position, minlength=self.num_speculative_tokens)
        self._by_position *= _FORGET**counted
        _count(self._by_position, position, outcome)
        self._position_estimates = None
        self._num_first_drafts += int(np.count_nonzero(position == 0))


def _bounded(acceptance: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(acceptance, _BOUNDS[0]), _BOUNDS[1])


def _count(table: np.ndarray, index: np.ndarray, outcome: np.ndarray) -> None:
    """Add outcomes to [accepted | tested, index]."""
    size = table.shape[1]
    table[0] += np.bincount(index, weights=outcome, minlength=size)
    table[1] += np.bincount(index, minlength=size)
