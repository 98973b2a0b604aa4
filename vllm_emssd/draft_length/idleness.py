"""Steps in which no draft paid: how often to plan all the same, and when to probe."""

from __future__ import annotations

_PROBE_SHARE = 0.005  # of idle time that probes may take,
_HOPEFUL_SHARE = 0.03  # or this, where drafts may well pay
_RAREST_PROBE = 128  # or, after so many steps, whether or not,
_OFTENEST_PROBE = 4  # but no fewer than this between two
_LEAST_GAIN = 0.02  # of a plan, on average: noise and what is not priced
_GAIN_RATE = 0.1  # share of the latest plan in that average
_DOZE_AFTER = 16  # steps; from then on plans are made as seldom as probes may be


class Idleness:
    """Starts with a step in which drafting did not pay and ends when it does: by more
    than a little, so that where it hardly pays most steps do without a plan."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._mean_gain = 1.0
        self._num_since_probe = 0
        self._ms_since_probe = 0.0

    def count(self, ms: float) -> None:
        """One step more, of so many milliseconds."""
        self.num_steps += 1
        self._num_since_probe += 1
        self._ms_since_probe += ms

    def take_in(self, gain: float, ms: float) -> None:
        """A planned step of so many milliseconds. `gain`: how much more its drafts
        bring for its time than none would, as a share of that; 0 if none pay."""
        self._mean_gain += _GAIN_RATE * (gain - self._mean_gain)
        if gain > 0 and self._mean_gain >= _LEAST_GAIN:
            self.num_steps = 0
            self.start_over()
        else:
            self.count(ms)

    def start_over(self) -> None:
        """A probe is made: the time for the next one begins."""
        self._num_since_probe, self._ms_since_probe = 0, 0.0

    @property
    def dozes(self) -> bool:
        """Nothing has paid for long, and a plan is as dear as a probe is rare."""
        return self.num_steps >= _DOZE_AFTER and bool(self.num_steps % _OFTENEST_PROBE)

    def may_probe(self, probe_ms: float) -> bool:
        """Whether a probe that is likely to find drafts that pay is not too much."""
        is_cheap = probe_ms <= _HOPEFUL_SHARE * self._ms_since_probe
        return is_cheap and self._num_since_probe >= _OFTENEST_PROBE

    def must_probe(self, probe_ms: float) -> bool:
        """Whether it is time for one, likely or not."""
        is_cheap = probe_ms <= _PROBE_SHARE * self._ms_since_probe
        return is_cheap or self._num_since_probe >= _RAREST_PROBE
