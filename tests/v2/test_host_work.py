"""What the host does in a steady drafting step, and what it replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.v2.dispatches import BATCHES, COPIES, LAYERS, K
from tests.v2.emulated import FAULTS
from tests.v2.host_work import KERNEL, REPLAY, HostWork, counting
from tests.v2.results import results_of

BUDGET = 80  # operators dispatched, kernels launched and graphs replayed


def steps() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = results_of("tests.v2.dispatches")
    return found


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("requests", BATCHES)
def test_a_steady_step_stays_within_the_budget(layers: int, requests: int) -> None:
    seen = [s for s in steps() if (s["layers"], s["requests"]) == (layers, requests)]
    assert len(seen) >= 2
    for step in seen:
        assert step["calls"][REPLAY] == K
        assert step["total"] <= BUDGET, step["calls"]


@pytest.mark.parametrize("requests", BATCHES)
def test_a_step_that_copies_stays_within_the_budget(requests: int) -> None:
    seen = [s for s in steps() if (s["layers"], s["requests"]) == (COPIES, requests)]
    assert len(seen) >= 2
    for step in seen:
        assert step["calls"][KERNEL] == 2
        assert step["total"] <= BUDGET, step["calls"]


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


def test_replayed_forwards_draft_what_follows_from_the_text() -> None:
    """Launched or replayed, with padding, in changing batches, up to the context's end:
    the runs compare each draft themselves."""
    seen = results_of("tests.v2.emulated")
    assert seen["launched"] == [run | {"replays": 0} for run in seen["replayed"]]
    assert min(run["drafts"] for run in seen["replayed"]) > 50
    assert min(run["replays"] for run in seen["replayed"]) > 20


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_recording_holds_fast_is_noticed(fault: str) -> None:
    assert results_of("tests.v2.emulated")["errors"][fault]
