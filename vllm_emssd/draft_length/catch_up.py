"""What feeding a request's missed text to the drafter is worth.

Who has not drafted for a while must be caught up, once; that is worth it for all the
steps in which it then drafts. Alone with a draft model these are many. Where requests
copy and draft in turns they are few, and each turn costs its catch-up again.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST_STEPS = 32.0  # that a catch-up is charged over
_PRIOR_CATCH_UPS = 2.0  # at the start, each worth the most steps
_FORGET = 0.99  # weight kept at each step that drafts


class CatchUps:
    """Requests that are to draft in a step, per one that was not in the step before.

    Steps without a plan do not count: where drafting hardly pays most are, and drafting
    would look as short as their intervals.
    """

    def __init__(self) -> None:
        self._drafted: set[str] = set()  # by the plan before
        self.start_over()

    def start_over(self) -> None:
        """Nothing was drafted for long: it may last, if it begins again."""
        self._num_drafting = _PRIOR_CATCH_UPS * MOST_STEPS
        self._num_caught_up = _PRIOR_CATCH_UPS

    def observe(self, req_ids: Iterable[str]) -> None:
        """A step in which these draft, perhaps none."""
        drafting = set(req_ids)
        if drafting:
            num_caught_up = len(drafting - self._drafted)
            self._num_drafting = _FORGET * self._num_drafting + len(drafting)
            self._num_caught_up = _FORGET * self._num_caught_up + num_caught_up
        self._drafted = drafting

    @property
    def num_steps(self) -> float:
        """Over which a catch-up is charged: 1 to `MOST_STEPS`."""
        return min(self._num_drafting / max(self._num_caught_up, 1e-9), MOST_STEPS)
