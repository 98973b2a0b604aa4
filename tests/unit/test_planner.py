"""The batch's depth against trying every one, and what it says time is worth."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.draft_batches import step_of
from vllm_emssd.draft_length import Copies, CostTable, StepCosts, StepInfo, planner
from vllm_emssd.draft_length.planner import LongRunRate, best_plan

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


def by_the_book(
    step: StepInfo, acceptance: np.ndarray, costs: StepCosts, depth: int
) -> tuple[float, float]:
    """Tokens and milliseconds, drafts and all."""
    num_reqs, base = len(step.req_ids), step.base_rows
    tokens = num_reqs * (1 + np.cumprod(acceptance)[:depth].sum())
    ms = costs.fixed_ms + costs.target.at(num_reqs)
    ms += costs.target.at(base + num_reqs * depth) - costs.target.at(base)
    ms += depth * costs.draft.at(num_reqs)
    if depth:  # and text that the drafter missed, as over many steps
        missed = costs.draft.at(int(step.missing_rows.sum())) - costs.draft.at(num_reqs)
        ms += costs.speculation_ms + missed / planner._BACKFILL_STEPS
    return float(tokens), float(ms)


def best_rate(step: StepInfo, acceptance: np.ndarray, costs: StepCosts) -> float:
    """What time is worth where all steps are like this one, copies left out."""
    books = [by_the_book(step, acceptance, costs, d) for d in range(K + 1)]
    return max(tokens / ms for tokens, ms in books)


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
    books = [by_the_book(step, alpha, costs, d) for d in range(K + 1)]
    best = max(tokens / ms for tokens, ms in books)
    for rate in (best, best / 2):
        plan = best_plan(step, alpha, costs, rate)
        tokens, ms = books[plan.depth]
        assert (plan.tokens[plan.depth], plan.ms[plan.depth]) == pytest.approx(
            (tokens, ms)
        )
        value = max(tokens - rate * ms for tokens, ms in books)
        assert tokens - rate * ms == pytest.approx(value, rel=1e-6, abs=1e-6)
        assert plan.gain >= 0
        assert (plan.gain > 1e-9) <= (plan.depth > 0)
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
    for costs, pays in ((per_row, False), (recorded, True)):
        rate = best_rate(step_of(2), alpha, costs)
        assert (best_plan(step_of(2), alpha, costs, rate).depth == 3) == pays


def test_a_request_keeps_a_copy_that_brings_more_than_drafts() -> None:
    rows = np.full(4, 4, dtype=np.int64)
    copies = Copies(rows, np.array([3.9, 0.3, 3.9, 0.3]))
    step = dataclasses.replace(step_of(4), copies=copies)
    alpha = np.full(K, 0.7)
    rate = 12.4 / PER_ROW.target.at(20)  # of the copies
    plan = best_plan(step, alpha, PER_ROW, rate)
    assert plan.may_draft.tolist() == [False, True, False, True]
    assert plan.depth > 0
    plan = best_plan(step, alpha, PER_ROW, rate, stopping_gain=4.0)
    assert plan.may_draft.all(), "stopping makes drafts better than their depth says"
    expensive = dataclasses.replace(PER_ROW, draft=CostTable([1], [60.0]))
    assert best_plan(step, alpha, expensive, rate).depth == 0


@property_test
@given(
    st.lists(st.tuples(st.integers(0, 7), st.floats(0, 1)), min_size=1, max_size=5),
    ACCEPTANCE,
    st.sampled_from([0.0, 0.3, 3.0]),
    st.sampled_from([0.1, 0.4, 1.2]),
)
def test_no_other_copies_and_depth_earn_more(
    copies: list[tuple[int, float]],
    acceptance: list[float],
    draft_ms: float,
    rate: float,
) -> None:
    """Each request with a copy keeps it or drafts as deep as the others do."""
    costs = dataclasses.replace(
        PER_ROW,
        draft=CostTable([1, 64], [draft_ms, 4 * draft_ms]),
        speculation_ms=1.0,
        copying_ms=0.5,
    )
    rows = np.array([num_rows for num_rows, _ in copies])
    gains = rows * np.array([share for _, share in copies])
    step = dataclasses.replace(step_of(len(rows)), copies=Copies(rows, gains))
    drafted = np.append(0.0, np.cumprod(acceptance).cumsum())

    def value(keeps: np.ndarray, depth: int) -> float:
        num_drafting, num_copied = np.count_nonzero(~keeps), rows[keeps].sum()
        ms = costs.fixed_ms + depth * costs.draft.at(num_drafting)
        ms += costs.target.at(len(rows) + num_copied + num_drafting * depth)
        ms += costs.speculation_ms if depth else costs.copying_ms * (num_copied > 0)
        tokens = len(rows) + gains[keeps].sum() + num_drafting * drafted[depth]
        return float(tokens - rate * ms)

    choices = itertools.product(*([False, True] if n else [False] for n in rows))
    best = max(value(np.array(c), depth) for c in choices for depth in range(K + 1))
    plan = best_plan(step, np.array(acceptance), costs, rate)
    assert value(~plan.may_draft, plan.depth) == pytest.approx(best)
    kept = rows > 0 if not plan.depth else ~plan.may_draft
    assert plan.tokens[plan.depth] - rate * plan.ms[plan.depth] == pytest.approx(
        value(kept, plan.depth)
    )


def test_what_stopping_gains_is_a_share_of_all_tokens() -> None:
    """Of one request that may draft beside three that copy."""
    copies = Copies(np.array([7, 7, 7, 0]), np.array([6.0, 6.0, 6.0, 0.0]))
    step = dataclasses.replace(step_of(4), copies=copies)
    alpha = np.full(K, 0.5)
    without = best_plan(step, alpha, FLAT, 22 / 24)
    plan = best_plan(step, alpha, FLAT, 22 / 24, stopping_gain=0.44)
    assert plan.may_draft.tolist() == [False, False, False, True]
    assert plan.gain - without.gain == pytest.approx(0.44 / 22)


def test_copies_make_time_worth_more() -> None:
    """In a step without any too: what they bring in others must not be slowed down."""
    alpha, step = np.full(K, 0.3), step_of(5)
    costs = dataclasses.replace(FLAT, draft=CostTable([1], [2.0]))
    alone = best_rate(step, alpha, costs)
    assert best_plan(step, alpha, costs, alone).depth > 0
    assert best_plan(step, alpha, costs, 3 * alone).depth == 0


def test_long_run_rate_is_that_of_all_steps_not_the_best_ones() -> None:
    """It holds for other numbers of requests: as a multiple of steps without drafts."""
    rate = LongRunRate(PER_ROW)
    plain_ms = PER_ROW.fixed_ms + PER_ROW.target.at(8)
    assert rate.tokens_per_ms(8) == pytest.approx(8 / plain_ms)
    for _ in range(200):
        rate.step_planned(8, 32.0, 2 * plain_ms)
        rate.step_planned(8, 8.0, plain_ms)
    assert rate.tokens_per_ms(8) == pytest.approx(40 / 3 / plain_ms, rel=0.05)
    more = PER_ROW.fixed_ms + PER_ROW.target.at(24)
    assert rate.tokens_per_ms(24) == pytest.approx(40 / more, rel=0.05)


@pytest.mark.parametrize("num_reqs", [0, 3])
def test_no_request_may_draft(num_reqs: int) -> None:
    step = step_of(num_reqs)
    step = dataclasses.replace(step, max_draft_tokens=np.zeros(num_reqs, np.int64))
    plan = best_plan(step, np.full(K, 0.95), FLAT, 1.0)
    assert plan.depth == 0
    assert not plan.may_draft.any()


def test_where_all_is_free() -> None:
    free = CostTable([1], [0.0])
    costs = StepCosts(free, free, 0.0)
    rate = LongRunRate(costs).tokens_per_ms(2)
    plan = best_plan(step_of(2), np.full(K, 0.95), costs, rate)
    assert plan.depth == K
    assert np.isfinite(plan.tokens_per_ms)
