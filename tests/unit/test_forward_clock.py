"""A GPU's times are read once they are there, and never waited for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from vllm_emssd.integration import forward_clock
from vllm_emssd.integration.forward_clock import EventClock, WallClock, clock_of


class Stream:
    """A device that has run nothing yet, and its events."""

    def __init__(self) -> None:
        self.num_queued = self.num_done = 0

    def event(self) -> Event:
        return Event(self)


@dataclass
class Event:
    """Has neither `synchronize` nor `wait`: a call to them fails."""

    stream: Stream
    place: int = -1

    def record(self) -> None:
        self.place = self.stream.num_queued
        self.stream.num_queued += 1

    def query(self) -> bool:
        return self.place < self.stream.num_done

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query()
        return 10.0 * (end.place - self.place)


def test_events_are_read_once_they_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr("torch.cuda.Event", lambda enable_timing: stream.event())
    clock = EventClock()
    for num_rows in (5, 7):
        clock.start()
        stream.num_queued += num_rows  # kernels
        clock.stop(num_rows)
    assert clock.take_timings() == []
    stream.num_done = 6  # all but the first forward's last event
    assert clock.take_timings() == []
    stream.num_done = 7
    assert clock.take_timings() == [(5, 60.0)]
    assert clock.take_timings() == []
    stream.num_done = stream.num_queued
    assert clock.take_timings() == [(7, 80.0)]
    clock.start()
    stream.num_queued += 5
    clock.stop(2, num_forwards=3)
    stream.num_done = stream.num_queued
    assert clock.take_timings() == [(2, 20.0)] * 3


def test_timings_that_are_not_taken_do_not_pile_up() -> None:
    clock = WallClock()
    for num_rows in range(3000):
        clock.start()
        clock.stop(num_rows)
    timings = clock.take_timings()
    assert [num_rows for num_rows, _ in timings] == list(range(3000 - 1024, 3000))
    assert all(ms >= 0 for _, ms in timings)
    assert clock.take_timings() == []


def test_one_more_forward_costs_what_is_decided_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([1.0, 3.0, 10.0, 20.0, 22.0])
    monkeypatch.setattr(forward_clock.time, "perf_counter", lambda: next(now))
    clock = WallClock()
    clock.start()  # 1
    clock.stop(5)  # 3
    clock.start()  # counts from 3
    clock.stop(2)  # 10
    assert clock.take_timings() == [(5, 2e3), (2, 7e3)]
    clock.start()  # 20: the next step's first
    clock.stop(4, num_forwards=2)  # 22
    assert clock.take_timings() == [(4, 1e3)] * 2


@pytest.mark.parametrize(("device", "kind"), [("cpu", WallClock), ("cuda", EventClock)])
def test_the_device_decides(device: str, kind: type) -> None:
    assert isinstance(clock_of(torch.device(device)), kind)
