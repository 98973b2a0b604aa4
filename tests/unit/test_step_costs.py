"""What live steps tell: of forwards, and of what a step costs besides them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.integration.row_counts import RecentRowCounts
from vllm_emssd.integration.step_costs import (
    StepCostMeter,
    _learn,
    _learn_rest,
    _row_counts_of,
)


def costs(fixed_ms: float, speculation_ms: float) -> StepCosts:
    free = CostTable([1], [0.0])
    return StepCosts(free, free, fixed_ms, speculation_ms)


def learned(start: StepCosts, *steps: tuple[float, bool]) -> tuple[float, float]:
    for _ in range(200):
        for ms, has_drafted in steps:
            _learn_rest(start, ms, has_drafted)
    return start.fixed_ms, start.speculation_ms


def test_each_kind_of_step_tells_its_own_cost() -> None:
    found = learned(costs(4.0, 0.0), (3.0, False), (8.0, True))
    assert found == pytest.approx((3.0, 5.0), abs=0.3)


def test_quick_steps_with_drafts_say_that_those_without_are_no_dearer() -> None:
    assert learned(costs(4.0, 2.0), (1.0, True)) == pytest.approx((1.0, 0.0), abs=0.01)


def test_steps_with_drafts_alone_leave_the_others_price() -> None:
    assert learned(costs(4.0, 0.0), (9.0, True)) == pytest.approx((4.0, 5.0), abs=0.01)


def test_steps_without_drafts_leave_what_drafting_costs_more() -> None:
    assert learned(costs(4.0, 2.0), (7.0, False)) == pytest.approx((7.0, 2.0), abs=0.01)


def test_the_first_forward_of_a_row_count_is_no_price_unless_it_is_quick() -> None:
    table = CostTable([1, 64], [10.0, 20.0])
    known = _row_counts_of(table)
    _learn(table, [(rows, 60.0) for rows in range(2, 40)], known)
    assert table.points == [(1, 10.0), (64, 20.0)]
    _learn(table, [(rows, 12.0) for rows in range(40, 64)], known)
    assert table.points[1][1] < 19.0
    before = table.at(1), table.at(64)
    _learn(table, [(39, 30.0), (64, 30.0)], known)
    assert table.at(1) > before[0]
    assert table.at(64) > before[1]


def test_row_counts_met_longest_ago_are_forgotten() -> None:
    known = RecentRowCounts(2, [7])
    assert [known.meet(rows) for rows in (7, 8, 7, 9)] == [True, False, True, False]
    assert [known.meet(rows) for rows in (7, 8)] == [True, False]


@pytest.mark.parametrize("learns", [False, True])
def test_a_step_that_rests_tells_what_a_step_costs_but_no_price(learns: bool) -> None:
    target: Any = SimpleNamespace(take_timings=lambda: [(8, 0.0)])
    alone: Any = SimpleNamespace(is_alone=True)
    measured = CostTable([8], [10.0]), CostTable([1], [0.0])
    meter = StepCostMeter(measured, target, None, alone)
    fixed_ms = meter.costs.fixed_ms
    for _ in range(3):
        meter.step_done(learns_prices=learns)
    assert meter.costs.fixed_ms < fixed_ms
    assert (meter.costs.target.at(8) < 10.0) == learns
