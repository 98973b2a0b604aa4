"""What goes wrong in mid-run ends in a clear error, and no process hangs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.conftest import Runs
from tests.distributed.engines import (
    DISAGREE_OVER_RAY,
    KILL_OVER_MP,
    Outcome,
    Setting,
)

pytestmark = pytest.mark.distributed

SOON = 60  # seconds from an incident to the error; vLLM itself would wait for 300


def slow(**options: Any) -> Any:
    return pytest.param(Setting(**options), marks=pytest.mark.slow)


KILLED = [KILL_OVER_MP, slow(tp=2, backend="ray", incident="kill")]
DISAGREE = [
    DISAGREE_OVER_RAY,
    slow(tp=2, incident="disagree"),
    slow(proposer="llma", tp=2, incident="disagree"),
    slow(draft_length="fixed", tp=2, incident="disagree"),
]


def ended_clearly(outcome: Outcome) -> None:
    outcome.check()  # not killed for taking too long
    assert len(outcome.report.errors) == 8  # every request has been told
    assert all("EngineDeadError" in error for error in outcome.report.errors)
    assert outcome.report.seconds_to_error < SOON
    outcome.left_nothing()


@pytest.mark.parametrize("setting", KILLED, ids=str)
def test_killed_worker(setting: Setting, runs: Runs) -> None:
    outcome = runs.of(setting)
    ended_clearly(outcome)
    assert "died unexpectedly" in outcome.log


@pytest.mark.parametrize("setting", DISAGREE, ids=str)
def test_ranks_that_disagree_stop_the_engine(setting: Setting, runs: Runs) -> None:
    outcome = runs.of(setting)
    ended_clearly(outcome)
    assert "decided differently on draft lengths" in outcome.log
