"""What a step costs besides its forwards, with drafts and without."""

from __future__ import annotations

import pytest

from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.integration.step_costs import _learn_rest


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
