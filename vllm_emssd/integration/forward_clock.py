"""How long forwards take on the device that runs them.

A CPU has computed a forward once the call returns, so the wall clock tells. On a GPU
events in its stream do. They are read once it has passed them, which may be a step
later; nothing waits for them.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from torch import nn

_MAX_KEPT = 1024  # forwards not yet asked for; more than a step has


class ForwardClock:
    """Times one forward after the other, each of `num_rows`, or some that follow one
    another together; they are told as alike. This one tells none."""

    def start(self) -> None: ...

    def stop(self, num_rows: int, num_forwards: int = 1) -> None: ...

    def take_timings(self) -> list[tuple[int, float]]:
        """(rows, ms) of forwards whose time has become known since the last call, in
        order."""
        return []


class WallClock(ForwardClock):
    """A forward that follows another one of the same step is timed from the end of that
    one, so that the decision between them is part of its cost."""

    def __init__(self) -> None:
        self._started = 0.0
        self._stopped: float | None = None
        self._timings: deque[tuple[int, float]] = deque(maxlen=_MAX_KEPT)

    def start(self) -> None:
        self._started = self._stopped or time.perf_counter()

    def stop(self, num_rows: int, num_forwards: int = 1) -> None:
        self._stopped = time.perf_counter()
        ms = (self._stopped - self._started) * 1e3
        self._timings += [(num_rows, ms / num_forwards)] * num_forwards

    def take_timings(self) -> list[tuple[int, float]]:
        timings = list(self._timings)
        self._timings.clear()
        self._stopped = None
        return timings


class EventClock(ForwardClock):
    """By events in the current stream."""

    def __init__(self) -> None:
        self._started: Any = None
        self._pending: deque[tuple[int, int, Any, Any]] = deque(maxlen=_MAX_KEPT)

    def start(self) -> None:
        self._started = self._recorded()

    def stop(self, num_rows: int, num_forwards: int = 1) -> None:
        self._pending.append((num_rows, num_forwards, self._started, self._recorded()))

    def take_timings(self) -> list[tuple[int, float]]:
        timings: list[tuple[int, float]] = []
        while self._pending and self._pending[0][3].query():
            num_rows, number, started, stopped = self._pending.popleft()
            ms = started.elapsed_time(stopped)
            timings += [(num_rows, ms / number)] * number
        return timings

    def _recorded(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def clock_of(device: torch.device) -> ForwardClock:
    return WallClock() if device.type == "cpu" else EventClock()


class TimedByClock:
    """Forwards of one model, timed once they are given a clock."""

    returns_confidence = False  # of a drafter: in a step's forwards
    clock = ForwardClock()

    def take_timings(self) -> list[tuple[int, float]]:
        """(rows, ms) of those whose time has become known since the last call."""
        return self.clock.take_timings()


class ForwardTimer(TimedByClock):
    """A model's last forward and the logits computed after it, timed on a CPU."""

    def __init__(self, model: Any) -> None:
        self._rows = 0
        self._ms = 0.0
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after)
        self._compute_logits = model.compute_logits
        model.compute_logits = self._timed_logits

    def take_timings(self) -> list[tuple[int, float]]:
        return [(self._rows, self._ms)]

    def _timed_logits(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        logits = self._compute_logits(*args, **kwargs)
        self._ms += (time.perf_counter() - start) * 1e3
        return logits

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        token_ids = kwargs.get("input_ids")
        self._rows = 0 if token_ids is None else int(token_ids.shape[0])
        self._started = time.perf_counter()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._ms = (time.perf_counter() - self._started) * 1e3
