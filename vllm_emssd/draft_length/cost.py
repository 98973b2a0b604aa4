"""What a forward costs: milliseconds by rows, measured and kept fresh.

Costs are staircases: the first rows come for the price of reading the weights, later
ones each cost arithmetic. So a table is a few measured points with straight lines
between them, never falling: a point above a later one costs what that one does, and is
known by its own measure all the same, or the two could never part again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_RATE = 0.05  # share of an observation in the points beside it,
_STARTING_WORTH = 4.0  # or more while few were seen: times that a first price is worth
_SHARED = 0.7  # of their change that all other points make: the machine is the same
_MOST_CHANGE = 2.0  # times its price is the most that an observation counts as
_OUTLIER = 5.0  # times the price: another process ran, not a forward,
_MOST_OUTLIERS = 8  # unless it goes on like that
_LOOKED_UP = 2  # times the last point: all that is asked for in practice
_MOST_LOOKED_UP = 2048
_LEAST_MS = 1e-6
_BEYOND = 1.25  # times the last point: farther out, rows say nothing about the points


class Curve(NamedTuple):
    """A table's prices for compiled code."""

    by_rows: np.ndarray  # ms of 0, 1, 2, ... rows, to the last point and beyond
    slope_beyond: float


class CostTable:
    """Milliseconds of one model's forward by its rows.

    Args:
        rows: [num_points] row counts, rising, >= 1.
        ms: [num_points] finite and >= 0; a point above a later one is lowered to it:
            what else a machine does only ever adds to a time.
    """

    def __init__(self, rows: Iterable[int], ms: Iterable[float]) -> None:
        self._rows = np.array(list(rows), dtype=np.float64)
        self._measured = np.array(list(ms), dtype=np.float64)
        self._ms = _non_falling(self._measured)
        if self._rows.size == 0 or self._rows.size != self._ms.size:
            raise ValueError("a cost table needs as many times as row counts, >= 1")
        if (np.diff(self._rows) <= 0).any() or not np.isfinite(self._ms).all():
            raise ValueError("row counts must rise and times be finite")
        self._outliers = 0  # in a row
        self._seen = [0] * self._rows.size  # observations beside each point
        self._seen_in_all = 0
        self._row_list: list[float] = self._rows.tolist()
        self._points_moved()

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[int, float]]) -> CostTable:
        """The quickest of repeated measurements (rows, ms)."""
        times = quickest_times(samples)
        return cls(times.keys(), times.values())

    def ms(self, rows: np.ndarray) -> np.ndarray:
        """Cost of each row count; 0 rows cost nothing. Shape kept, float64."""
        rows = np.asarray(rows)
        if rows.dtype.kind == "i" and rows.size:
            by_rows = self._looked_up
            if rows.max() < by_rows.size:
                return np.asarray(by_rows[rows])
        return self._interpolated(rows.astype(np.float64))

    def at(self, rows: int) -> float:
        """Cost of one row count."""
        if rows < 1:
            return 0.0
        right = bisect_left(self._row_list, rows)
        if right == len(self._row_list):
            beyond = rows - self._row_list[-1]
            return float(self._ms[-1]) + beyond * self._slope_beyond
        ms = float(self._ms[right])
        if right == 0 or rows == self._row_list[right]:
            return ms
        first, last = self._row_list[right - 1], self._row_list[right]
        before = float(self._ms[right - 1])
        return before + (ms - before) * (rows - first) / (last - first)

    def from_to(self, first: int, last: int) -> np.ndarray:
        """Cost of `first`, `first` + 1, ..., `last` rows. Not to be written to."""
        by_rows = self._looked_up
        if last < by_rows.size:
            return by_rows[first : last + 1]
        return self.ms(np.arange(first, last + 1))

    def convex(self, first: int, last: int) -> np.ndarray:
        """The dearest convex prices that are nowhere above the table's, of `first` to
        `last` rows: what a row costs to who goes on beyond a stair."""
        table = self.from_to(first, last)
        corners = [0, *(int(r) - first for r in self._row_list if first < r < last)]
        hull: list[int] = []
        for corner in (*corners, last - first):
            while len(hull) > 1 and _is_above(table, hull[-2], hull[-1], corner):
                hull.pop()
            if not hull or corner > hull[-1]:
                hull.append(corner)
        return np.interp(np.arange(table.size), hull, table[hull])

    def _interpolated(self, rows: np.ndarray) -> np.ndarray:
        cost = np.interp(rows, self._rows, self._ms)
        beyond = np.maximum(rows - self._rows[-1], 0)
        return np.where(rows < 1, 0.0, cost + beyond * self._slope_beyond)

    def _points_moved(self) -> None:
        # Both until asked for.
        self._last_slope: float | None = None
        self._by_rows: np.ndarray | None = None

    @property
    def _looked_up(self) -> np.ndarray:
        """Cost of 0, 1, 2, ... rows: a policy asks for thousands a step."""
        if self._by_rows is None:
            most = min(int(_LOOKED_UP * self._rows[-1]), _MOST_LOOKED_UP)
            self._by_rows = self._interpolated(np.arange(most + 1, dtype=np.float64))
        return self._by_rows

    def observe(self, rows: int, ms: float) -> None:
        """A forward of `rows` took `ms`: move the points beside it a little."""
        is_near = 1 <= rows <= _BEYOND * self._rows[-1]
        if not is_near or not np.isfinite(ms) or ms < 0:
            return
        price = self.at(rows)
        self._outliers = self._outliers + 1 if ms > _OUTLIER * price else 0
        if 0 < self._outliers <= _MOST_OUTLIERS:
            return
        if ms < price / _MOST_CHANGE:
            # No noise makes a forward this quick: what was measured before was slowed.
            self._measured *= (1 + ms / price) / 2
        else:
            price = max(price, _LEAST_MS)
            self._move_points(rows, min(ms, _MOST_CHANGE * price), price)
        self._ms = _non_falling(self._measured)
        self._points_moved()

    def _move_points(self, rows: int, ms: float, price: float) -> None:
        right = min(bisect_left(self._row_list, rows), len(self._row_list) - 1)
        left = max(right - 1, 0) if self._row_list[right] != rows else right
        beside = [left] if left == right else [left, right]
        rate = _rate(min(self._seen[left], self._seen[right]))
        change = ms / price - 1
        measured = self._measured
        if rows < self._row_list[-1]:
            own = float(np.interp(rows, self._rows[beside], measured[beside]))
        else:
            own = float(measured[right]) * price / max(self._ms[-1], _LEAST_MS)
        moved = measured[beside] * (1 + rate * (ms / max(own, _LEAST_MS) - 1))
        # What was measured at the start, at its quickest, and never seen since must not
        # look cheap beside live times: the price of a row more is their difference.
        measured *= 1 + _SHARED * _rate(self._seen_in_all) * change
        # More rows cannot be quicker: if they were when they were measured, they rise.
        later = measured[right + 1 :]
        if change > 0:
            risen = np.minimum(later * (1 + rate * change), moved[-1])
            np.maximum(later, risen, out=later)
        measured[beside] = moved
        self._seen_in_all += 1
        for point in beside:
            self._seen[point] += 1

    @property
    def curve(self) -> Curve:
        return Curve(self._looked_up, self._slope_beyond)

    @property
    def points(self) -> list[tuple[int, float]]:
        return [(int(r), float(m)) for r, m in zip(self._rows, self._ms, strict=True)]

    @property
    def _slope_beyond(self) -> float:
        """Over the table's upper half: two neighbours alone may be noise."""
        if self._last_slope is None:
            last = self._row_list[-1]
            start = max(last / 2, self._row_list[0])
            half = float(np.interp(start, self._rows, self._ms))
            rise = float(self._ms[-1]) - half
            self._last_slope = rise / (last - start) if last > start else 0.0
        return self._last_slope


def quickest_times(samples: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Of repeated measurements (rows, ms), row counts rising."""
    times: dict[int, float] = {}
    for rows, ms in samples:
        times[rows] = min(ms, times.get(rows, ms))
    return dict(sorted(times.items()))


def _is_above(ms: np.ndarray, left: int, middle: int, right: int) -> bool:
    """Whether the price in the middle is above the line between the other two."""
    rise = (ms[right] - ms[left]) / (right - left)
    return bool(ms[middle] >= ms[left] + rise * (middle - left))


def _rate(num_seen: int) -> float:
    """Share of the next observation where so many came before it."""
    return max(_RATE, 1 / (_STARTING_WORTH + num_seen + 1))


def _non_falling(ms: np.ndarray) -> np.ndarray:
    return np.asarray(np.minimum.accumulate(ms[::-1])[::-1]).copy()
