"""When planning and probing are worth their time."""

from __future__ import annotations

import pytest

from vllm_emssd.draft_length.idleness import Idleness


def planned(gain: float, num_steps: int, idleness: Idleness | None = None) -> Idleness:
    idleness = idleness or Idleness()
    for _ in range(num_steps):
        idleness.take_in(gain, ms=40.0)
    return idleness


@pytest.mark.parametrize(
    ("gain", "is_idle"), [(0.2, False), (0.05, False), (0.005, True)]
)
def test_idle_where_plans_gain_less_than_they_cost(gain: float, is_idle: bool) -> None:
    idleness = planned(gain, 200)
    assert (idleness.num_steps > 100) == is_idle
    assert idleness.num_steps == 0 or is_idle


def test_one_good_step_now_and_then_is_enough_if_it_is_good() -> None:
    often, seldom = Idleness(), Idleness()
    for step in range(400):
        planned(0.2 if step % 4 == 0 else 0.0, 1, often)
        planned(0.2 if step % 40 == 0 else 0.0, 1, seldom)
    assert often.num_steps < 4
    assert seldom.num_steps > 16


def test_wakes_soon_when_drafts_pay_again() -> None:
    idleness = planned(0.0, 500)
    assert idleness.num_steps == 500
    assert planned(0.3, 1, idleness).num_steps == 0


def test_dozes_three_steps_of_four_and_not_at_once() -> None:
    idleness, dozes = Idleness(), []
    for _ in range(40):
        idleness.count(40.0)
        dozes.append(idleness.dozes)
    assert not any(dozes[:15])
    assert sum(dozes[20:]) == 15


def test_probes_by_their_share_of_the_time() -> None:
    idleness = Idleness()
    for _ in range(10):
        idleness.count(40.0)
    assert idleness.may_probe(12.0)
    assert not idleness.may_probe(12.1)
    assert not idleness.must_probe(12.0)
    assert idleness.must_probe(2.0)
    idleness.start_over()
    assert not idleness.may_probe(0.1), "just made one"
    for _ in range(128):
        idleness.count(0.0)
    assert idleness.must_probe(1e9), "overdue"
