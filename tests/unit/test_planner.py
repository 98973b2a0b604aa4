"""The batch's depth against trying every one, and what it says time is worth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.draft_batches import step_of
from vllm_emssd.draft_length import Copies, CostTable, StepCosts, StepInfo, planner
from vllm_emssd.draft_length.planner import best_plan

property_test = settings(max_examples=200, deadline=None, derandomize=True)
K = 4
BY_EIGHT = [-(-n // 8) * 8 for n in range(65)]  # rows computed with CUDA graphs


@st.composite
def tables(draw: st.DrawFn) -> CostTable:
    """Staircases: flat, steep and very expensive stretches."""
    rows = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=6)))
    steps = [draw(st.sampled_from([0.0, 0.0, 0.1, 1.0, 5.0, 1e6])) for _ in rows]
    computed = draw(st.sampled_from([(), BY_EIGHT]))
    return CostTable(rows, np.cumsum([0.01, *steps[1:]]), computed)


@st.composite
def step_costs(draw: st.DrawFn) -> StepCosts:
    rest = [draw(st.sampled_from([0.0, 0.3, 4.0])) for _ in range(3)]
    costs = StepCosts(draw(tables()), draw(tables()), *rest[:2])
    return dataclasses.replace(costs, copying_ms=rest[2])


ACCEPTANCE = st.lists(
    st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.995]), min_size=K, max_size=K
)


def rate(step: StepInfo, acceptance: np.ndarray, costs: StepCosts, depth: int) -> float:
    """Tokens a millisecond, drafts and all, by the book."""
    num_reqs, base = len(step.req_ids), step.base_rows
    tokens = num_reqs * (1 + np.cumprod(acceptance)[:depth].sum())
    ms = max(costs.fixed_ms + costs.target.at(num_reqs), 1e-6)
    ms += costs.target.at(base + num_reqs * depth) - costs.target.at(base)
    ms += depth * costs.draft.at(num_reqs)
    if depth:  # and text that the drafter missed, as over many steps
        missed = costs.draft.at(int(step.missing_rows.sum())) - costs.draft.at(num_reqs)
        ms += costs.speculation_ms + missed / planner._BACKFILL_STEPS
    return float(tokens / max(ms, 1e-6))


@property_test
@given(
    st.integers(1, 9),
    st.integers(0, 30),
    st.sampled_from([1, 2, 99]),
    ACCEPTANCE,
    step_costs(),
)
def test_no_other_depth_earns_more(
    num_reqs: int,
    prefill_rows: int,
    missing: int,
    acceptance: list[float],
    costs: StepCosts,
) -> None:
    """Prompts in the step do not make drafts cheap."""
    step = step_of(num_reqs, missing=missing)
    step = dataclasses.replace(step, num_prefill_rows=prefill_rows)
    alpha = np.array(acceptance)
    plan = best_plan(step, alpha, costs)
    rates = [rate(step, alpha, costs, d) for d in range(K + 1)]
    assert rates[plan.depth] == pytest.approx(max(rates))
    assert plan.tokens_per_ms == pytest.approx(max(rates))
    assert plan.gain == pytest.approx(max(rates) / rates[0] - 1, abs=1e-6)
    assert min(plan.verify_ms, plan.draft_ms) >= -1e-9


FLAT = StepCosts(CostTable([1], [20.0]), CostTable([1], [1.0]), 4.0)
PER_ROW = StepCosts(CostTable([1, 512], [20.0, 200.0]), CostTable([1], [1.0]), 4.0)


def test_rows_that_would_be_padding_cost_nothing() -> None:
    """Two requests have eight rows with three drafts each; the ninth costs eight."""
    rows, alpha = [1, 64], np.full(K, 0.4)
    per_row = StepCosts(
        CostTable(rows, [2.0, 128.0]), CostTable([1], [0.0]), fixed_ms=0.1
    )
    recorded = dataclasses.replace(
        per_row, target=CostTable(rows, [2.0, 128.0], BY_EIGHT)
    )
    assert best_plan(step_of(2), alpha, per_row).depth < 3
    assert best_plan(step_of(2), alpha, recorded).depth == 3


def test_a_request_keeps_a_copy_that_brings_more_than_drafts() -> None:
    rows = np.full(4, 4, dtype=np.int64)
    copies = Copies(rows, np.array([3.9, 0.3, 3.9, 0.3]))
    step = dataclasses.replace(step_of(4), copies=copies)
    alpha = np.full(K, 0.7)
    plan = best_plan(step, alpha, PER_ROW)
    assert plan.may_draft.tolist() == [False, True, False, True]
    assert plan.depth > 0
    plan = best_plan(step, alpha, PER_ROW, stopping_gain=4.0)
    assert plan.may_draft.all(), "stopping makes drafts better than their depth says"
    expensive = dataclasses.replace(PER_ROW, draft=CostTable([1], [60.0]))
    assert best_plan(step, alpha, expensive).depth == 0


def test_what_stopping_gains_is_a_share_of_all_tokens() -> None:
    """Of one request that may draft beside three that copy."""
    copies = Copies(np.array([7, 7, 7, 0]), np.array([6.0, 6.0, 6.0, 0.0]))
    step = dataclasses.replace(step_of(4), copies=copies)
    alpha = np.full(K, 0.5)
    without = best_plan(step, alpha, FLAT)
    plan = best_plan(step, alpha, FLAT, stopping_gain=0.44)
    assert plan.may_draft.tolist() == [False, False, False, True]
    assert plan.gain - without.gain == pytest.approx(0.44 / 22)


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
    plan = best_plan(step, np.full(K, 0.95), FLAT)
    assert plan.depth == 0
    assert not plan.may_draft.any()


def test_where_all_is_free() -> None:
    free = CostTable([1], [0.0])
    plan = best_plan(step_of(2), np.full(K, 0.95), StepCosts(free, free, 0.0))
    assert plan.depth == K
    assert np.isfinite(plan.tokens_per_ms)
