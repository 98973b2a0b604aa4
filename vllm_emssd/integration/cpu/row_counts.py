"""Row counts that a model was lately computed at."""

from __future__ import annotations

from collections.abc import Iterable


class RecentRowCounts:
    """The row counts used last. A forward of another one may be slow for once: kernels
    are made for it, memory is found for it.

    Args:
        most: how many to remember.
        known: some to start with.
    """

    def __init__(self, most: int, known: Iterable[int] = ()) -> None:
        self._most = most
        self._rows = dict.fromkeys(known)  # the latest last

    def meet(self, rows: int) -> bool:
        """Remember it. Returns whether it was known."""
        was_known = rows in self._rows
        self._rows.pop(rows, None)
        self._rows[rows] = None
        if len(self._rows) > self._most:
            del self._rows[next(iter(self._rows))]
        return was_known
