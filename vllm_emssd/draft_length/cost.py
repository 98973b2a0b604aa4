"""What a forward costs: milliseconds by rows, measured and kept fresh.

Costs are staircases: the first rows come for the time of reading the weights, later
ones each cost arithmetic. So a table is a few measured points with straight lines
between them, never falling: a point measured above a later one costs what the later one
does, but keeps its own time, so that later observations can tell the two apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

_RATE = 0.05  # weight of an observation in the points beside it,
_FIRST_WEIGHT = 4.0  # or more while few were seen: observations a first time counts as
_SHARED = 0.7  # of their change that all other points make: the machine is the same
_MOST_CHANGE = 2.0  # times its cost is the most that an observation counts as
_OUTLIER = 5.0  # times the cost: another process ran, not a forward,
_MOST_OUTLIERS = 8  # in a row; what goes on for longer is the cost
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
        self._rows = np.array(list(rows), dtype=np.float64)
        self._measured = np.array(list(ms), dtype=np.float64)
        if self._rows.size == 0 or self._rows.size != self._measured.size:
            raise ValueError("a cost table needs as many times as row counts, >= 1")
        if (np.diff(self._rows) <= 0).any() or not np.isfinite(self._measured).all():
            raise ValueError("row counts must rise and times be finite")
        self._outliers = 0  # in a row
        self._seen = [0] * self._rows.size  # observations beside each point
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
        return [(int(r), float(m)) for r, m in zip(self._rows, self._ms, strict=True)]

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
        if rows >= self._rows_list[-1]:
            beyond = (rows - self._rows_list[-1]) * self._slope_beyond
            return self._ms_list[-1] + beyond
        right = bisect_right(self._rows_list, rows)
        if right == 0:
            return self._ms_list[0]
        start, end = self._rows_list[right - 1 : right + 1]
        share = (rows - start) / (end - start)
        low, high = self._ms_list[right - 1 : right + 1]
        return low + share * (high - low)

    def cover(self, rows: int) -> None:
        """Live forwards have as many rows: add points up to there, each at twice the
        rows of the one before, at the extrapolated cost until they are observed."""
        while _BEYOND * self._rows[-1] < rows:
            next_rows = 2 * int(self._rows[-1])
            self._measured = np.append(self._measured, self.at(next_rows))
            self._rows = np.append(self._rows, float(next_rows))
            self._seen.append(0)
            self._update()

    def observe(self, rows: int, ms: float) -> None:
        """A forward of `rows` took `ms`: move the points beside it a little."""
        is_near = 1 <= rows <= _BEYOND * self._rows[-1]
        if not is_near or not np.isfinite(ms) or ms < 0:
            return
        cost = max(self.at(rows), _LEAST_MS)
        self._outliers = self._outliers + 1 if ms > _OUTLIER * cost else 0
        if 0 < self._outliers <= _MOST_OUTLIERS:
            return
        if ms < cost / _MOST_CHANGE:
            # Noise makes no forward this quick: what was measured before was slowed.
            quicker = self._measured * (1 + ms / cost) / 2
            self._measured = np.maximum(quicker, _LEAST_MS)
        else:
            self._move_points(rows, min(ms, _MOST_CHANGE * cost) / cost)
        self._update()

    def _move_points(self, rows: int, ratio: float) -> None:
        """An observation is `ratio` times the cost of its rows."""
        measured, last = self._measured, len(self._rows) - 1
        right = min(int(np.searchsorted(self._rows, rows)), last)
        left = right if rows == self._rows[right] else max(right - 1, 0)
        beside = slice(left, right + 1)
        rate = _weight(min(self._seen[beside]))
        own = np.interp(rows, self._rows[beside], measured[beside])
        ms = ratio * np.interp(rows, self._rows, self._ms)
        moved = measured[beside] * (1 + rate * (ms / max(own, _LEAST_MS) - 1))
        # Points that were measured at the start, at their quickest, and not seen since
        # must not look cheap beside live times: another row costs their difference.
        measured *= 1 + _SHARED * _weight(sum(self._seen) // 2) * (ratio - 1)
        # More rows cannot be quicker: if they were when they were measured, they rise.
        later = measured[right + 1 :]
        if ratio > 1:
            later[:] = np.maximum(
                later, np.minimum(later * (1 + rate * (ratio - 1)), moved[-1])
            )
        measured[beside] = moved
        for point in range(left, right + 1):
            self._seen[point] += 1

    def _update(self) -> None:
        """The points moved. Beyond the last the slope is that of the table's upper
        half: two neighbors alone may be noise."""
        self._ms = np.minimum.accumulate(self._measured[::-1])[::-1].copy()
        self._rows_list, self._ms_list = self._rows.tolist(), self._ms.tolist()
        first, last = self._rows[0], self._rows[-1]
        middle = max(last / 2, first)
        rise = self._ms[-1] - np.interp(middle, self._rows, self._ms)
        self._slope_beyond = float(rise / (last - middle)) if last > middle else 0.0


def quickest_times(samples: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Of repeated measurements (rows, ms), row counts rising."""
    times: dict[int, float] = {}
    for rows, ms in samples:
        times[rows] = min(ms, times.get(rows, ms))
    return dict(sorted(times.items()))


def _weight(num_seen: int) -> float:
    """Of the next observation where so many came before it."""
    return max(_RATE, 1 / (_FIRST_WEIGHT + num_seen + 1))
