"""What live steps tell: of forwards, and of what a step costs besides them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.integration import forward_clock
from vllm_emssd.integration.costs import StepCostMeter, _learn
from vllm_emssd.integration.forward_clock import ForwardTimer


def meter_of(fixed_ms: float = 4.0, speculation_ms: float = 0.0) -> StepCostMeter:
    """Of a target whose forwards take no time and were thought to take 10 ms."""
    target: Any = SimpleNamespace(take_timings=lambda: [(8, 0.0)])
    alone: Any = SimpleNamespace(is_alone=True)
    tables = CostTable([8], [10.0]), CostTable([1], [0.0])
    return StepCostMeter(
        StepCosts(*tables, fixed_ms, speculation_ms), target, None, alone
    )


def learned(meter: StepCostMeter, *steps: tuple[float, bool]) -> tuple[float, float]:
    for _ in range(200):
        for ms, has_drafted in steps:
            meter._learn_rest(ms, 0, has_drafted)
    return meter.costs.fixed_ms, meter.costs.speculation_ms


def test_each_kind_of_step_tells_its_own_cost() -> None:
    found = learned(meter_of(4.0, 0.0), (3.0, False), (8.0, True))
    assert found == pytest.approx((3.0, 5.0), abs=0.3)


def test_quick_steps_with_drafts_say_that_those_without_cost_no_more() -> None:
    assert learned(meter_of(4.0, 2.0), (1.0, True)) == pytest.approx(
        (1.0, 0.0), abs=0.01
    )


def test_steps_with_drafts_alone_leave_the_others_cost() -> None:
    assert learned(meter_of(4.0, 0.0), (9.0, True)) == pytest.approx(
        (4.0, 5.0), abs=0.01
    )


def test_steps_without_drafts_leave_what_drafting_costs_more() -> None:
    assert learned(meter_of(4.0, 2.0), (7.0, False)) == pytest.approx(
        (7.0, 2.0), abs=0.01
    )


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


@pytest.mark.parametrize("learns", [False, True])
def test_an_idle_step_tells_what_a_step_costs_but_not_a_forward(learns: bool) -> None:
    meter = meter_of()
    for _ in range(3):
        meter.step_done(0, learns_costs=learns)
    assert meter.costs.fixed_ms < 4.0
    assert (meter.costs.target.at(8) < 10.0) == learns


def test_draft_forwards_are_learned_however_rare() -> None:
    """Thought to take 10 ms, they take 1; an idle engine drafts in few steps."""
    meter = meter_of()
    meter.costs.draft = CostTable([1], [10.0])
    timings: list[tuple[int, float]] = []
    meter._drafter = SimpleNamespace(  # type: ignore[assignment]
        take_timings=lambda: timings, tells_confidence=False
    )
    for step in range(8 * 128):
        timings[:] = [(1, 1.0)] if step % 128 == 3 else []
        meter.step_done(0)
    assert meter.costs.draft.at(1) < 5.0


@pytest.mark.parametrize("true_ms", [0.3, 16.5, 80.0, 2000.0])
def test_whatever_a_step_costs_is_learned_however_far_from_the_guess(
    true_ms: float,
) -> None:
    assert learned(meter_of(), (true_ms, False))[0] == pytest.approx(true_ms, rel=0.01)


def test_a_step_of_more_requests_costs_more_though_it_was_never_seen() -> None:
    """Seen with one request and no drafts, then only with drafts."""
    meter = meter_of(1.0, 0.0)
    for _ in range(200):
        meter._learn_rest(2.0, 1, has_drafted=False)
    for _ in range(200):
        meter._learn_rest(7.0, 33, has_drafted=True)
    assert meter.costs.fixed_ms == pytest.approx(4.0, rel=0.02)
    assert meter.costs.speculation_ms == pytest.approx(3.0, rel=0.05)


def test_pauses_between_requests_are_no_cost() -> None:
    """A user thinks for a second, now and then."""
    meter = meter_of()
    for step in range(600):
        meter._learn_rest(1000.0 if step % 5 == 0 else 4.0, 0, has_drafted=False)
    assert meter.costs.fixed_ms == pytest.approx(4.0)


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
