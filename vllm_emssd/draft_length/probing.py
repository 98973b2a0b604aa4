"""When to look again whether drafts pay, in steps in which they did not."""

from __future__ import annotations

LEAST_GAIN = 0.02  # of a plan: less is within the error of its costs
_SHORTEST, _LONGEST = 4, 128  # steps from one probe to the next
_PROBE_SHARE = 0.005  # of the time that probes may take, unless they get too rare,
_HOPEFUL_SHARE = 0.03  # or this after one whose drafts were accepted
_MAX_STEPS_BETWEEN_PLANS = 32


class Probing:
    """Idle from a plan whose drafts do not pay to one whose drafts do.

    Idle steps are planned ever more rarely. A *probe* lets one request make a few
    drafts: soon again after one whose drafts were all accepted, else half as often.
    """

    def __init__(self) -> None:
        self._stop_idling()

    def _stop_idling(self) -> None:
        self.is_idle = False
        self._num_steps = 0  # idle ones
        self._last_probe = 0
        self._interval, self._share = _SHORTEST, _PROBE_SHARE
        self._next_plan = 0
        self._num_sampling = 0  # when last planned

    def skips_step(self, num_sampling: int) -> bool:
        """Whether an idle step needs no plan. A batch of another size does."""
        if not self.is_idle or not num_sampling:
            return False
        self._num_steps += 1
        changed = not self._num_sampling / 2 <= num_sampling <= 2 * self._num_sampling
        return self._num_steps < self._next_plan and not changed

    def pays(self, gain: float, num_sampling: int) -> bool:
        """Whether to draft by a plan. `gain`: as a share of what no drafts give."""
        if gain >= LEAST_GAIN:
            self._stop_idling()
            return True
        self.is_idle = True
        self._num_sampling = num_sampling
        between = min(1 + self._num_steps // 4, _MAX_STEPS_BETWEEN_PLANS)
        if self._share == _HOPEFUL_SHARE:
            between = _SHORTEST
        self._next_plan = self._num_steps + between
        return False

    def is_due(self, probe_ms: float, step_ms: float) -> bool:
        """Whether to probe in this idle step."""
        between = max(self._interval, probe_ms / max(self._share * step_ms, 1e-9))
        if self._num_steps - self._last_probe < min(between, _LONGEST):
            return False
        self._last_probe = self._num_steps
        self._interval = min(2 * self._interval, _LONGEST)
        self._share = _PROBE_SHARE
        return True

    def drafts_accepted(self) -> None:
        """All drafts of a request were: while idle those of a probe, so probe again
        soon."""
        if self.is_idle:
            self._interval, self._share = _SHORTEST, _HOPEFUL_SHARE
            self._next_plan = min(self._next_plan, self._num_steps + _SHORTEST)
