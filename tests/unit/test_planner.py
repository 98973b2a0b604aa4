"""The batch's depth against trying every one, and what it says time is worth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.draft_batches import step_of
from vllm_emssd.draft_length import Copies, CostTable, StepCosts, StepInfo
from vllm_emssd.draft_length.planner import best_plan

property_test = settings(max_examples=200, deadline=None, derandomize=True)
K = 4


@st.composite
def tables(draw: st.DrawFn) -> CostTable:
    """Staircases: flat, steep and very expensive stretches."""
    rows = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=6)))
    steps = [draw(st.sampled_from([0.0, 0.0, 0.1, 1.0, 5.0, 1e6])) for _ in rows]
    return CostTable(rows, np.cumsum([0.01, *steps[1:]]))


@st.composite
def step_costs(draw: st.DrawFn) -> StepCosts:
    rest = [draw(st.sampled_from([0.0, 0.3, 4.0])) for _ in range(2)]
    return StepCosts(draw(tables()), draw(tables()), *rest)


ACCEPTANCE = st.lists(
    st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.995]), min_size=K, max_size=K
)


def rate(step: StepInfo, acceptance: np.ndarray, costs: StepCosts, depth: int) -> float:
    """Tokens a millisecond, drafts and all, by the book."""
    num_reqs, base = len(step.req_ids), step.base_rows
    tokens = num_reqs * (1 + np.cumprod(acceptance)[:depth].sum())
    ms = max(costs.fixed_ms + costs.target.at(num_reqs), 1e-6)
    ms += costs.target.at(base + num_reqs * depth) - costs.target.at(base)
    ms += depth * costs.draft.at(num_reqs) + (costs.speculation_ms if depth else 0.0)
    return float(tokens / ms)


@property_test
@given(st.integers(1, 9), st.integers(0, 30), ACCEPTANCE, step_costs())
def test_no_other_depth_earns_more(
    num_reqs: int, prefill_rows: int, acceptance: list[float], costs: StepCosts
) -> None:
    step, alpha = step_of(num_reqs), np.array(acceptance)
    step = dataclasses.replace(step, num_prefill_rows=prefill_rows)
    plan = best_plan(step, alpha, costs)
    rates = [rate(step, alpha, costs, depth) for depth in range(K + 1)]
    assert rates[plan.depth] == pytest.approx(max(rates))
    assert plan.tokens_per_ms == pytest.approx(max(rates))
    assert plan.gain == pytest.approx(max(rates) / rates[0] - 1, abs=1e-6)
    assert min(plan.verify_ms, plan.draft_ms) >= -1e-9


@property_test
@given(st.integers(1, 9), ACCEPTANCE, step_costs(), st.integers(0, K - 1))
def test_better_drafts_never_earn_less(
    num_reqs: int, acceptance: list[float], costs: StepCosts, depth: int
) -> None:
    worse = np.array(acceptance)
    better = worse.copy()
    better[depth] = 0.995
    step = step_of(num_reqs)
    found = [best_plan(step, alpha, costs).tokens_per_ms for alpha in (worse, better)]
    assert found[1] >= found[0] * (1 - 1e-9)


@property_test
@given(st.integers(1, 9), ACCEPTANCE, step_costs(), st.sampled_from([0.1, 3.0]))
def test_what_costs_more_is_never_drafted_deeper(
    num_reqs: int, acceptance: list[float], costs: StepCosts, more: float
) -> None:
    step, alpha = step_of(num_reqs), np.array(acceptance)
    cheap = best_plan(step, alpha, costs)
    points = [(rows, ms + more) for rows, ms in costs.draft.points]
    costs = dataclasses.replace(costs, draft=CostTable(*zip(*points, strict=True)))
    dear = best_plan(step, alpha, costs)
    assert dear.depth <= cheap.depth
    assert dear.tokens_per_ms <= cheap.tokens_per_ms * (1 + 1e-9)


FLAT = StepCosts(CostTable([1], [20.0]), CostTable([1], [1.0]), 4.0)
PER_ROW = StepCosts(CostTable([1, 512], [20.0, 200.0]), CostTable([1], [1.0]), 4.0)
GOOD, USELESS = np.full(K, 0.95), np.zeros(K)


def test_zero_is_a_normal_answer() -> None:
    assert best_plan(step_of(8), USELESS, FLAT).depth == 0
    assert best_plan(step_of(8), GOOD, FLAT).depth == K


def test_prompts_in_the_step_do_not_make_drafts_cheap() -> None:
    """A step is slow with a prompt in it; that a draft slows it less says nothing."""
    alpha = np.array([0.3, 0.3, 0.3, 0.3])
    alone = best_plan(step_of(16), alpha, PER_ROW)
    prompt = dataclasses.replace(step_of(16), num_prefill_rows=300)
    with_prompt = best_plan(prompt, alpha, PER_ROW)
    assert alone.depth == with_prompt.depth
    assert with_prompt.tokens_per_ms == pytest.approx(alone.tokens_per_ms)


def test_text_that_the_drafter_missed_is_charged_over_many_steps() -> None:
    per_row = CostTable([1, 512], [1.0, 100.0])
    costs = dataclasses.replace(FLAT, draft=per_row)
    rates = [
        best_plan(step_of(4, missing=n), GOOD, costs).tokens_per_ms for n in (1, 100)
    ]
    assert 0.9 * rates[0] < rates[1] < rates[0]


def test_a_request_keeps_a_copy_that_brings_more_than_drafts() -> None:
    rows = np.full(4, 4, dtype=np.int64)
    copies = Copies(rows, np.array([3.9, 0.3, 3.9, 0.3]))
    step = dataclasses.replace(step_of(4), copies=copies)
    alpha = np.full(K, 0.7)
    plan = best_plan(step, alpha, PER_ROW)
    assert plan.may_draft.tolist() == [False, True, False, True]
    assert plan.depth > 0
    expensive = dataclasses.replace(PER_ROW, draft=CostTable([1], [60.0]))
    assert best_plan(step, alpha, expensive).depth == 0


def test_copies_make_time_worth_more() -> None:
    """What they bring must not be slowed down by drafts that bring less."""
    copies = Copies(np.array([8] * 4 + [0]), np.array([7.9] * 4 + [0.0]))
    step = dataclasses.replace(step_of(5), copies=copies)
    alpha = np.array([0.3, 0.3, 0.3, 0.3])
    costs = dataclasses.replace(FLAT, draft=CostTable([1], [2.0]))
    assert best_plan(step_of(5), alpha, costs).depth > 0
    assert best_plan(step, alpha, costs).depth == 0


@pytest.mark.parametrize("num_reqs", [0, 3])
def test_no_request_may_draft(num_reqs: int) -> None:
    step = step_of(num_reqs)
    step = dataclasses.replace(step, max_draft_tokens=np.zeros(num_reqs, np.int64))
    plan = best_plan(step, GOOD, FLAT)
    assert plan.depth == 0
    assert not plan.may_draft.any()


def test_where_all_is_free() -> None:
    free = CostTable([1], [0.0])
    plan = best_plan(step_of(2), GOOD, StepCosts(free, free, 0.0))
    assert plan.depth == K
    assert np.isfinite(plan.tokens_per_ms)
