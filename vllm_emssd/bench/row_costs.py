"""What a row costs, from the forwards of a run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

MIN_FORWARDS = 3  # of one row count, for its median to count


def row_cost(
    forwards: Sequence[tuple[int, float]], most_rows: int
) -> tuple[float, float]:
    """Least-squares line through the median ms of each row count.

    forwards: (rows, ms) of each; those of more than `most_rows` are left out.
    Returns: ms of a forward, and ms a row on top; nan with fewer than two row counts.
    """
    by_rows: dict[int, list[float]] = {}
    for rows, ms in forwards:
        if rows <= most_rows:
            by_rows.setdefault(rows, []).append(ms)
    points = [(r, median(ms)) for r, ms in by_rows.items() if len(ms) >= MIN_FORWARDS]
    if len(points) < 2:
        return float("nan"), float("nan")
    rows_np, ms_np = np.array(points).T
    slope, fixed = np.polyfit(rows_np, ms_np, 1)
    return float(fixed), float(slope)
