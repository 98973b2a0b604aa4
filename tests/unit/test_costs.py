"""What live steps tell: of forwards, and of what a step costs besides them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.integration import forward_clock
from vllm_emssd.integration.costs import (
    _ROWS_OF_GPUS,
    BY_CONFIDENCE,
    BY_DEPTH,
    COPYING,
    PLAIN,
    StepCostMeter,
    _learn,
    time_forwards,
)
from vllm_emssd.integration.forward_clock import ForwardTimer
from vllm_emssd.integration.frontend.capture_sizes import _MAX_ROWS


def meter_of(fixed_ms: float = 4.0, speculation_ms: float = 0.0) -> StepCostMeter:
    """Of a target whose forwards take no time and were thought to take 10 ms."""
    target: Any = SimpleNamespace(take_timings=lambda: [(8, 0.0)])
    alone: Any = SimpleNamespace(is_alone=True)
    tables = CostTable([8], [10.0]), CostTable([1], [0.0])
    return StepCostMeter(
        StepCosts(*tables, fixed_ms, speculation_ms), target, None, alone
    )


def learned(meter: StepCostMeter, *steps: tuple[float, int]) -> tuple[float, ...]:
    for _ in range(200):
        for ms, kind in steps:
            meter._learn_rest(ms, 8, kind)
    costs = meter.costs
    return costs.fixed_ms, costs.speculation_ms, costs.deciding_ms, costs.copying_ms


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(3.0, PLAIN), (8.0, BY_DEPTH)], (3.0, 5.0)),
        ([(3.0, PLAIN), (8.0, BY_DEPTH), (9.0, BY_CONFIDENCE)], (3.0, 5.0, 1.0)),
        ([(3.0, PLAIN), (4.5, COPYING), (8.0, BY_DEPTH)], (3.0, 5.0, 0.0, 1.5)),
        # Those without drafts cost no more than quick ones with.
        ([(1.0, BY_DEPTH)], (1.0, 0.0)),
        # Until drafts were made without confidences, these are thought to be free.
        ([(9.0, BY_CONFIDENCE)], (5.0, 4.0, 0.0)),
    ],
)
def test_each_kind_of_step_tells_its_own_cost(
    steps: list[tuple[float, int]], expected: tuple[float, ...]
) -> None:
    found = learned(meter_of(4.0, 2.0), *steps)
    assert found[: len(expected)] == pytest.approx(expected, abs=0.1)


def test_the_first_forward_of_a_row_count_is_no_cost_unless_it_is_quick() -> None:
    table = CostTable([1, 64], [10.0, 20.0])
    known = {1, 64}
    _learn(table, [(rows, 60.0) for rows in range(2, 40)], known)
    assert table.points == [(1, 10.0), (64, 20.0)]
    _learn(table, [(rows, 12.0) for rows in range(40, 64)], known)
    assert table.points[1][1] < 19.0
    before = table.at(1), table.at(64)
    _learn(table, [(39, 30.0), (64, 30.0)], known)
    assert table.at(1) > before[0]
    assert table.at(64) > before[1]


def taken(monkeypatch: pytest.MonkeyPatch, *steps: tuple[float, dict[str, Any]]) -> Any:
    """A meter that saw steps of so many seconds, told so of each, 200 times."""
    now, meter = 0.0, meter_of()
    monkeypatch.setattr("time.perf_counter", lambda: now)
    for seconds, told in steps * 200:
        now += seconds
        meter.step_done(**told)
    return meter


def test_steps_that_verify_copies_are_not_those_without_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copying, plain = {"num_reqs": 8, "verifies": True}, {"num_reqs": 8}
    meter = taken(monkeypatch, (0.009, copying), (0.003, plain))
    assert meter.costs.fixed_ms == pytest.approx(3.0, rel=0.05)
    assert meter.costs.copying_ms == pytest.approx(6.0, rel=0.05)


def test_a_guess_that_is_wrong_by_much_is_soon_replaced() -> None:
    """By the quickest of a few steps, as the first ones may be slow."""
    meter = meter_of(0.25)
    for ms in (90.0, 8.0, 6.0, 7.0, 30.0):
        meter._learn_rest(ms, 24, PLAIN)
    assert meter.costs.fixed_ms == pytest.approx(6.0)
    assert meter._rest_ms[PLAIN].at(8) == pytest.approx(6.0 * 1.25 / 1.75)


def test_idle_steps_are_timed_until_their_kind_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five of them, after the first, which tells no time."""
    now, meter = 0.0, meter_of(0.25)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    for _ in range(6):
        now += 0.006
        meter.step_done(8, learns_costs=False)
    assert meter.costs.fixed_ms == pytest.approx(6.0)


def test_a_step_of_prompts_alone_says_nothing_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meter = taken(monkeypatch, (0.003, {"num_reqs": 8}), (0.009, {"num_reqs": 0}))
    assert meter.costs.fixed_ms == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("learns", [False, True])
def test_an_idle_step_tells_what_a_step_costs_but_not_a_forward(learns: bool) -> None:
    meter = meter_of()
    for _ in range(40):
        meter.step_done(1, learns_costs=learns)
    assert meter.costs.fixed_ms < 4.0
    assert (meter.costs.target.at(8) < 10.0) == learns


def test_draft_forwards_are_learned_however_rare() -> None:
    """Thought to take 10 ms, they take 1; an idle engine drafts in few steps."""
    meter = meter_of()
    meter.costs.draft = CostTable([1], [10.0])
    timings: list[tuple[int, float]] = []
    meter._drafter = SimpleNamespace(  # type: ignore[assignment]
        take_timings=lambda: timings, returns_confidence=False
    )
    for step in range(8 * 128):
        timings[:] = [(1, 1.0)] if step % 128 == 3 else []
        meter.step_done(0)
    assert meter.costs.draft.at(1) < 5.0


def test_confidences_cost_what_forwards_that_tell_them_take_more() -> None:
    meter = meter_of()
    meter.costs.draft = CostTable([1], [1.0])
    drafter = SimpleNamespace(take_timings=lambda: [(1, 1.25)], returns_confidence=True)
    meter._drafter = drafter  # type: ignore[assignment]
    for _ in range(100):
        meter.step_done(0)
    assert meter.costs.confidence_ms == pytest.approx(0.25, rel=0.02)
    assert meter.costs.draft.at(1) == 1.0
    drafter.returns_confidence = False
    meter.step_done(0)
    assert meter.costs.draft.at(1) > 1.0


@pytest.mark.parametrize("true_ms", [0.3, 16.5, 80.0, 2000.0])
def test_whatever_a_step_costs_is_learned_however_far_from_the_guess(
    true_ms: float,
) -> None:
    assert learned(meter_of(), (true_ms, PLAIN))[0] == pytest.approx(true_ms, rel=0.01)


def test_a_step_of_more_requests_costs_more_though_it_was_never_seen() -> None:
    meter = meter_of(1.0)
    for num_reqs, ms, kind in [(1, 2.0, PLAIN), (33, 9.0, BY_DEPTH)]:
        for _ in range(200):
            meter._learn_rest(ms, num_reqs, kind)
    assert 3.0 < meter.costs.fixed_ms < 4.5


def test_pauses_between_requests_are_no_cost() -> None:
    """A user thinks for a second, now and then."""
    meter = meter_of()
    for step in range(600):
        meter._learn_rest(1000.0 if step % 5 == 0 else 4.0, 8, PLAIN)
    assert meter.costs.fixed_ms == pytest.approx(4.0, rel=0.01)


def test_forwards_beyond_the_table_are_learned_from() -> None:
    table = CostTable([1, 128, 256], [20.0, 40.0, 60.0])
    known = {1, 128, 256}
    for _ in range(300):
        _learn(table, [(1600, 700.0)], known)
    assert table.at(1600) == pytest.approx(700.0, rel=0.05)
    slow = CostTable([1, 128, 256], [25.0, 50.0, 70.0])
    _learn(slow, [(1600, 9000.0)], {1, 128, 256})
    rows = [[rows for rows, _ in t.points] for t in (table, slow)]
    assert rows[0] == rows[1], "every rank's table has the same rows"


class TimedModel:
    """A model that takes 20 ms, and 30 more for its logits."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock
        self.before: Any = None
        self.after: Any = None

    def register_forward_pre_hook(self, hook: Any, with_kwargs: bool) -> None:
        self.before = hook

    def register_forward_hook(self, hook: Any) -> None:
        self.after = hook

    def run(self, num_rows: int) -> None:
        self.before(self, (), {"input_ids": np.zeros(num_rows)})
        self._clock[0] += 0.020
        self.after(self, (), None)

    def compute_logits(self, hidden_states: Any) -> Any:
        self._clock[0] += 0.030
        return hidden_states


def test_a_targets_time_has_its_logits_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the drafter's has, or drafts would seem to cost too little to verify."""
    clock = [0.0]
    monkeypatch.setattr(forward_clock.time, "perf_counter", lambda: clock[0])
    model = TimedModel(clock)
    timer = ForwardTimer(model)
    for num_rows in (3, 5):
        model.run(num_rows)
        assert model.compute_logits("hidden") == "hidden"
        [(rows, ms)] = timer.take_timings()
        assert (rows, ms) == (num_rows, pytest.approx(50.0))
    model.run(7)
    assert timer.take_timings() == [(7, pytest.approx(20.0))]


@pytest.mark.parametrize(("device", "most"), [("cpu", 256), ("cuda", 1536)])
def test_steps_of_a_gpu_are_timed_as_far_as_graphs_are_recorded(
    monkeypatch: pytest.MonkeyPatch, device: str, most: int
) -> None:
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    asked: list[int] = []
    target = SimpleNamespace(take_timings=lambda: [(asked[-1], 1.0)])
    samples = time_forwards(asked.append, target, 1536, torch.device(device))
    assert max(asked) == most
    assert {rows for rows, _ in samples} == set(asked)
    assert _ROWS_OF_GPUS[-1] == _MAX_ROWS
