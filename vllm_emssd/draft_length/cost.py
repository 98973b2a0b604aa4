"""What a forward costs: milliseconds by rows, measured and kept fresh.

Costs are staircases: the first rows come for the time of reading the weights, later
ones each cost arithmetic. So a table is a few measured points with straight lines
between them, never falling: a point measured above a later one costs what the later one
does, but keeps its own time, so that later observations can tell the two apart.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

_RATE = 0.05  # weight of an observation in the points beside it,
_FIRST_WEIGHT = 4.0  # or more while few were seen: observations a first time counts as
_SHARED = 0.7  # of their change that all other points make: the machine is the same
_MAX_CHANGE = 2.0  # times its cost is the most that an observation counts as
_OUTLIER = 5.0  # times the cost: another process ran, not a forward,
_MAX_OUTLIERS = 8  # in a row; what goes on for longer is the cost
_LEAST_MS = 1e-6
_BEYOND = 1.25  # times the last point: farther out, rows say nothing about the points


@dataclass(slots=True)
class StepCosts:
    """Of one step with as many requests as the last: its forwards, and the rest."""

    target: CostTable
    draft: CostTable
    fixed_ms: float  # of a step without drafts, besides the target's forward
    speculation_ms: float = 0.0  # more in a step with drafts, besides their forwards
    deciding_ms: float = 0.0  # more again where confidences decide
    confidence_ms: float = 0.0  # more of each draft forward that tells confidences
    copying_ms: float = 0.0  # more in a step that verifies drafts but makes none
    computed_rows: Callable[[int], int] = int  # of the target, for as many as it needs

    def by_rows_verified(
        self, num_reqs: int, num_rows: int, depth: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Milliseconds of a step that makes `depth` drafts of each request: of all but
        the target's forward, for any number of requests up to these, [num_reqs + 1];
        and of that forward, by its rows, [num_rows + 1]. The latter are above 0."""
        rest_ms = self.fixed_ms + self.speculation_ms + depth * self.draft.at(num_reqs)
        verify_ms = self.target.ms(np.arange(num_rows + 1))
        return np.full(num_reqs + 1, rest_ms), np.maximum(verify_ms, _LEAST_MS)


class CostTable:
    """Milliseconds of one model's forward by its rows.

    Args:
        rows: [num_points] row counts, rising, >= 1.
        ms: [num_points] finite and >= 0; a point above a later one is lowered to it:
            what else a machine does only ever adds to a time.
        computed: [num_counts] rows that a forward of 0, 1, 2, ... rows computes, by
            which it costs: with CUDA graphs those of a recorded size. More rows than
            that compute as many as they are.
    """

    def __init__(
        self, rows: Iterable[int], ms: Iterable[float], computed: Iterable[int] = ()
    ) -> None:
        self._computed = np.array(list(computed), dtype=np.int64)
        self._computed_list = self._computed.tolist()
        # Lists: for so few points quicker than arrays, a few times in each step.
        self._rows = list(map(float, rows))
        self._measured = list(map(float, ms))
        if not self._rows or len(self._rows) != len(self._measured):
            raise ValueError("a cost table needs as many times as row counts, >= 1")
        rise = all(map(operator.lt, self._rows, self._rows[1:]))
        if not rise or not all(map(math.isfinite, self._measured)):
            raise ValueError("row counts must rise and times be finite")
        self._outliers = 0  # in a row
        self._seen = [0] * len(self._rows)  # observations beside each point
        self._update()

    @classmethod
    def from_samples(
        cls, samples: Iterable[tuple[int, float]], computed: Iterable[int] = ()
    ) -> CostTable:
        """The quickest of repeated measurements (rows, ms)."""
        times = quickest_times(samples)
        return cls(times.keys(), times.values(), computed)

    @property
    def points(self) -> list[tuple[int, float]]:
        return list(zip(map(int, self._rows), self._ms, strict=True))

    def ms(self, rows: np.ndarray) -> np.ndarray:
        """Cost of each row count; 0 rows cost nothing. Shape kept, float64."""
        if self._computed_list:
            most = len(self._computed_list) - 1
            computed = self._computed[np.clip(rows, 0, most).astype(np.int64)]
            rows = np.where(np.less_equal(rows, most), computed, rows)
        beyond = np.maximum(rows - self._rows[-1], 0) * self._slope_beyond
        cost = np.interp(rows, self._rows, self._ms) + beyond
        return np.where(np.less(rows, 1), 0.0, cost)

    def at(self, rows: int) -> float:
        """Cost of one row count; as `ms`, without its arrays."""
        if rows < 1:
            return 0.0
        if rows < len(self._computed_list):
            rows = self._computed_list[rows]
        beyond = max(rows - self._rows[-1], 0) * self._slope_beyond
        return self._between_points(rows) + beyond

    def _between_points(self, rows: float) -> float:
        right = bisect_right(self._rows, rows)
        if right in (0, len(self._rows)):
            return self._ms[max(right - 1, 0)]
        start, end = self._rows[right - 1 : right + 1]
        low, high = self._ms[right - 1 : right + 1]
        return low + (rows - start) / (end - start) * (high - low)

    def cover(self, rows: int) -> None:
        """Live forwards have as many rows: add points up to there, each at twice the
        rows of the one before, at the extrapolated cost until they are observed."""
        while _BEYOND * self._rows[-1] < rows:
            next_rows = 2 * int(self._rows[-1])
            self._measured.append(self.at(next_rows))
            self._rows.append(float(next_rows))
            self._seen.append(0)
            self._update()

    def observe(self, rows: int, ms: float) -> None:
        """A forward of `rows` took `ms`: move the points beside it a little."""
        is_near = 1 <= rows <= _BEYOND * self._rows[-1]
        if not is_near or not math.isfinite(ms) or ms < 0:
            return
        cost = max(self.at(rows), _LEAST_MS)
        self._outliers = self._outliers + 1 if ms > _OUTLIER * cost else 0
        if 0 < self._outliers <= _MAX_OUTLIERS:
            return
        if ms < cost / _MAX_CHANGE:
            # Noise makes no forward this quick: what was measured before was slowed.
            change = (1 + ms / cost) / 2
            self._measured = [max(m * change, _LEAST_MS) for m in self._measured]
        else:
            self._move_points(rows, min(ms, _MAX_CHANGE * cost) / cost)
        self._update()

    def _move_points(self, rows: int, ratio: float) -> None:
        """An observation is `ratio` times the cost of its rows."""
        counts, seen = self._rows, self._seen
        right = min(bisect_left(counts, rows), len(counts) - 1)
        left = right if rows == counts[right] else max(right - 1, 0)
        start, end = counts[left], counts[right]
        share = min((rows - start) / (end - start), 1.0) if left < right else 0.0
        own, ms = (
            times[left] + share * (times[right] - times[left])
            for times in (self._measured, self._ms)
        )
        rate = _weight(min(seen[left : right + 1]))
        of_own = 1 + rate * (ratio * ms / max(own, _LEAST_MS) - 1)
        moved = [m * of_own for m in self._measured[left : right + 1]]
        # Points that were measured at the start, at their quickest, and not seen since
        # must not look cheap beside live times: another row costs their difference.
        of_all = 1 + _SHARED * _weight(sum(seen) // 2) * (ratio - 1)
        measured = [m * of_all for m in self._measured]
        # More rows cannot be quicker: if they were when they were measured, they rise.
        if ratio > 1:
            of_later = 1 + rate * (ratio - 1)
            for i in range(right + 1, len(counts)):
                measured[i] = max(measured[i], min(measured[i] * of_later, moved[-1]))
        measured[left : right + 1] = moved
        self._measured = measured
        for i in range(left, right + 1):
            seen[i] += 1

    def _update(self) -> None:
        """The points moved. Beyond the last the slope is that of the table's upper
        half: two neighbors alone may be noise."""
        self._ms = list(accumulate(reversed(self._measured), min))[::-1]
        first, last = self._rows[0], self._rows[-1]
        middle = max(last / 2, first)
        rise = self._ms[-1] - self._between_points(middle)
        self._slope_beyond = rise / (last - middle) if last > middle else 0.0


def quickest_times(samples: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Of repeated measurements (rows, ms), row counts rising."""
    times: dict[int, float] = {}
    for rows, ms in samples:
        times[rows] = min(ms, times.get(rows, ms))
    return dict(sorted(times.items()))


def _weight(num_seen: int) -> float:
    """Of the next observation where so many came before it."""
    return max(_RATE, 1 / (_FIRST_WEIGHT + num_seen + 1))
