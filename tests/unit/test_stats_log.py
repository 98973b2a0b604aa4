"""One line a minute, and only of what happened since the last."""

from __future__ import annotations

import logging

import pytest

from vllm_emssd.integration.metrics import INTERVAL_SECONDS, StatsLog, describe
from vllm_emssd.metrics import Counters


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged. vLLM's loggers do not propagate to pytest's handler."""
    found: list[str] = []
    logger = logging.getLogger("vllm.emssd.stats")
    monkeypatch.setattr(logger, "info", lambda text, *args: found.append(text % args))
    return found


def step(counters: Counters, drafted: int, accepted: int) -> None:
    counters.num_steps += 1
    counters.num_draft_tokens += drafted
    counters.num_accepted_tokens += accepted
    counters.num_draft_rows += 5
    counters.num_padded_draft_rows += 20
    counters.num_verify_rows += 1 + drafted
    counters.num_padded_verify_rows += 2 * (1 + drafted)


def test_a_line_a_minute_of_what_was_gained(lines: list[str], clock: Clock) -> None:
    counters = Counters()
    log = StatsLog(counters, 3)
    for _ in range(120):
        step(counters, drafted=4, accepted=1)
        clock.now += 1
        log.step_done()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0] == (
        "Engine 003: emssd metrics: Drafted: 240 tokens, Accepted: 60 tokens (25.0%), "
        "Draft rows saved: 900 (75.0%), Verify rows saved: 300 (50.0%)"
    )


def test_an_idle_server_logs_nothing(lines: list[str], clock: Clock) -> None:
    counters = Counters()
    log = StatsLog(counters, 0)
    step(counters, 4, 4)
    log.step_done()
    clock.now += 100 * INTERVAL_SECONDS  # no step, no line
    assert lines == []
    step(counters, 4, 0)
    log.step_done()
    assert len(lines) == 1
    assert "Drafted: 8 tokens, Accepted: 4 tokens (50.0%)" in lines[0]


def test_copies_have_no_draft_rows_and_failures_are_named() -> None:
    gained = Counters(num_draft_tokens=2, num_failed_proposals=7).as_dict()
    assert describe(gained) == (
        "emssd metrics: Drafted: 2 tokens, Accepted: 0 tokens (0.0%), "
        "Verify rows saved: 0 (0.0%), Failed proposals: 7"
    )
