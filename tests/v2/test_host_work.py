"""What the host does in a steady drafting step, and that it waits for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from tests.v2.dispatches import BATCHES, LAYERS, K
from tests.v2.host_work import REPLAY, HostWork, counting

REPO = Path(__file__).resolve().parents[2]
BUDGET = 80  # operators dispatched, kernels launched and graphs replayed
TIMEOUT = 600  # seconds: 60 beside no other process


@cache
def steps() -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        subprocess.run(
            [sys.executable, "-m", "tests.v2.dispatches", str(path)],
            cwd=REPO,
            check=True,
            timeout=TIMEOUT,
        )
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return found


@pytest.mark.xfail(strict=True, reason="about 300 calls, and waits among them")
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("requests", BATCHES)
def test_a_steady_step_stays_within_the_budget(layers: int, requests: int) -> None:
    seen = [s for s in steps() if (s["layers"], s["requests"]) == (layers, requests)]
    assert len(seen) >= 2
    for step in seen:
        assert step["calls"][REPLAY] == K
        assert step["total"] <= BUDGET, step["calls"]


@pytest.mark.xfail(strict=True, reason="about 300 calls, and waits among them")
def test_a_steady_step_waits_for_nothing() -> None:
    assert {tuple(step["waits"]) for step in steps()} == {()}


def _by_index_of_the_host(tensor: torch.Tensor) -> Any:
    return tensor[torch.from_numpy(np.arange(2))]


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        (lambda t: t.sum().item(), "_local_scalar_dense"),
        (lambda t: bool(t.any()), "_local_scalar_dense"),
        (lambda t: t[t > 1], "index"),
        (lambda t: t.nonzero(), "nonzero"),
        (lambda t: t.cpu(), "cpu"),
        (lambda t: t.tolist(), "tolist"),
        (_by_index_of_the_host, "from_numpy"),
    ],
)
def test_what_waits_is_noticed(planted: Callable[..., Any], name: str) -> None:
    tensor = torch.arange(4)
    with counting(HostWork()) as work:
        planted(tensor)
    assert name in work.waits


def test_what_counts_as_one_counts_as_one() -> None:
    work = HostWork()
    add = work.counts_as_one(lambda t: t + 1 + 1, REPLAY)
    tensor = torch.zeros(2)
    with counting(work):
        add(tensor) * 2
    assert dict(work.calls) == {REPLAY: 1, "mul": 1}
