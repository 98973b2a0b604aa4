"""Starting and stopping again and again leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import Runs
from tests.distributed.engines import Setting, run_job

pytestmark = pytest.mark.distributed

NUM_CYCLES = 50
RAY_EVERY = 5  # cycles: one over Ray


@pytest.mark.slow
@pytest.mark.parametrize("cycle", range(NUM_CYCLES))
def test_cycle(cycle: int, runs: Runs, tmp_path: Path) -> None:
    is_ray = cycle % RAY_EVERY == RAY_EVERY - 1
    proposer = ("draft_model", "llma")[cycle % 2]
    setting = Setting(proposer, "auto", tp=2, backend="ray" if is_ray else "mp")
    cluster = runs.cluster if is_ray else None
    outcome = run_job(setting, tmp_path / "job", cluster).check()
    assert sum(map(len, outcome.report.token_ids)) > 0
    outcome.left_nothing()


def test_a_closed_terminal_stops_the_cluster(runs: Runs) -> None:
    assert len(runs.cluster.tree.members()) > 5
    exit_code, left = runs.stop_cluster()
    assert (exit_code, left) == (0, [])
