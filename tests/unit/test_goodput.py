"""Lengths by the price of time against trying everything, on small cases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.draft_length import Copies, CostTable, StepCosts, goodput, plan_search
from vllm_emssd.draft_length.catch_up import MOST_STEPS
from vllm_emssd.draft_length.goodput import (
    plan,
    plan_copies,
    verified_lengths,
    worth_another_forward,
)

property_test = settings(max_examples=150, deadline=None, derandomize=True)
PROBABILITIES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 1.0]))


@st.composite
def tables(draw: st.DrawFn) -> CostTable:
    """Staircases: flat, steep and very dear stretches."""
    rows = sorted(draw(st.sets(st.integers(1, 20), min_size=1, max_size=6)))
    steps = [draw(st.sampled_from([0.0, 0.0, 0.1, 1.0, 5.0, 1e9])) for _ in rows]
    return CostTable(rows, np.cumsum([0.01, *steps[1:]]))


@st.composite
def survivals(draw: st.DrawFn, max_reqs: int = 3, max_drafts: int = 3) -> np.ndarray:
    """Non-growing along a row, with equal ones; 0 beyond what may be drafted."""
    num_reqs = draw(st.integers(1, max_reqs))
    num_positions = draw(st.integers(1, max_drafts))
    alpha = [
        [draw(PROBABILITIES) for _ in range(num_positions)] for _ in range(num_reqs)
    ]
    return np.cumprod(np.array(alpha), axis=1)


def ms(table: CostTable, rows: float) -> float:
    return float(table.ms(np.array(rows)))


def all_lengths(num_reqs: int, most: int) -> itertools.product:
    return itertools.product(range(most + 1), repeat=num_reqs)


# ---------------------------------------------------------------- verification


def profit_of(
    lens: Sequence[int], survival: np.ndarray, base: int, table: CostTable, price: float
) -> float:
    gain = sum(survival[i, :n].sum() for i, n in enumerate(lens))
    return gain - price * ms(table, base + sum(lens))


@property_test
@given(survivals(), st.integers(0, 8), tables(), st.floats(0, 3))
def test_no_other_lengths_verify_better(
    survival: np.ndarray, base_rows: int, table: CostTable, price: float
) -> None:
    lens = verified_lengths(survival, base_rows, table, price)
    assert lens.shape == (len(survival),)
    assert (lens >= 0).all()
    assert (lens <= (survival > 0).sum(axis=1)).all(), "no draft, no row"
    best = max(
        profit_of(other, survival, base_rows, table, price)
        for other in all_lengths(*survival.shape)
    )
    found = profit_of(lens.tolist(), survival, base_rows, table, price)
    assert found == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_goes_on_past_a_dip() -> None:
    """The first draft does not pay, but the stair it opens has room for six."""
    table = CostTable([4, 5, 10], [1.0, 3.0, 3.0])
    survival = np.array([[0.9, 0.8], [0.9, 0.8], [0.9, 0.8]])
    assert verified_lengths(survival[:1, :1], 4, table, 1.0).tolist() == [0]
    assert verified_lengths(survival, 4, table, 1.0).tolist() == [2, 2, 2]


def test_equals_do_not_overrun_the_budget() -> None:
    """Before anything is known all requests are alike; only four rows are cheap."""
    table = CostTable([8, 12, 13], [1.0, 1.0, 100.0])
    lens = verified_lengths(np.full((8, 3), 0.5), 8, table, 1.0)
    assert lens.sum() == 4


@pytest.mark.parametrize("survival", [np.zeros((0, 3)), np.zeros((3, 0))])
def test_nothing_to_verify(survival: np.ndarray) -> None:
    lens = verified_lengths(survival, 1, CostTable([1], [1.0]), 1.0)
    assert lens.tolist() == [0] * len(survival)


def test_certain_drafts_and_impossible_ones() -> None:
    survival = np.array([[1.0, 1.0], [0.0, 0.0]])
    cheap, dear = CostTable([1, 9], [1.0, 2.0]), CostTable([2, 3], [1.0, 1e9])
    assert verified_lengths(survival, 2, cheap, 0.1).tolist() == [2, 0]
    assert verified_lengths(survival, 2, dear, 0.1).tolist() == [0, 0]


# ---------------------------------------------------------------- planning


def no_copies(num_reqs: int) -> Copies:
    return Copies(np.zeros(num_reqs, dtype=np.int64), np.zeros(num_reqs))


def tokens_per_ms(
    lens: Sequence[int],
    survival: np.ndarray,
    missing_rows: Sequence[int],
    num_prefill_rows: int,
    costs: StepCosts,
    copies: Copies | None = None,
    catch_up_steps: float = MOST_STEPS,
) -> float:
    """What a plan is worth, written out."""
    num_reqs = len(lens)
    copies = copies or no_copies(num_reqs)
    tokens = num_reqs + sum(survival[i, :n].sum() for i, n in enumerate(lens))
    tokens += sum(copies.gains[i] for i, n in enumerate(lens) if not n)
    decode_rows = num_reqs + int(copies.rows.sum())
    time = costs.fixed_ms + ms(costs.target, decode_rows)
    base_rows = decode_rows + num_prefill_rows
    rows = base_rows + sum(n - copies.rows[i] for i, n in enumerate(lens) if n)
    time += ms(costs.target, rows) - ms(costs.target, base_rows)
    first_rows = sum(
        1 + (missing_rows[i] - 1) / catch_up_steps for i, n in enumerate(lens) if n
    )
    time += ms(costs.draft, first_rows)
    for position in range(1, max(lens, default=0)):
        time += ms(costs.draft, sum(n > position for n in lens))
    return tokens / max(time, 1e-6)


@st.composite
def planning_cases(
    draw: st.DrawFn,
) -> tuple[np.ndarray, list[int], int, StepCosts]:
    survival = draw(survivals())
    missing = [draw(st.sampled_from([1, 1, 2, 3, 500])) for _ in survival]
    costs = StepCosts(draw(tables()), draw(tables()), draw(st.sampled_from([0, 1, 5])))
    return survival, missing, draw(st.sampled_from([0, 0, 7])), costs


@property_test
@given(planning_cases())
def test_plan_is_what_it_says_and_no_worse_than_drafting_nothing(
    case: tuple[np.ndarray, list[int], int, StepCosts],
) -> None:
    survival, missing, num_prefill_rows, costs = case
    num_reqs = len(survival)
    found = plan(survival, np.array(missing), num_reqs, num_prefill_rows, costs)
    assert (found.draft_lens <= (survival > 0).sum(axis=1)).all()
    worth = tokens_per_ms(
        found.draft_lens.tolist(), survival, missing, num_prefill_rows, costs
    )
    assert found.tokens_per_ms == pytest.approx(worth)
    nothing = tokens_per_ms([0] * num_reqs, survival, missing, num_prefill_rows, costs)
    assert worth >= nothing * (1 - 1e-9)


def random_table(rng: np.random.Generator, scale: float) -> CostTable:
    rows = np.sort(rng.choice(np.arange(1, 25), rng.integers(1, 7), replace=False))
    steps = rng.choice([0, 0.1, 1, 5], rows.size) * rng.random(rows.size)
    return CostTable(rows, 0.01 + scale * np.cumsum(steps))


def random_copies(rng: np.random.Generator, num_reqs: int) -> Copies:
    rows = rng.integers(0, 4, num_reqs)
    return Copies(rows, rows * rng.random(num_reqs))


def share_of_best(
    rng: np.random.Generator, missing_rows: Sequence[int], with_copies: bool = False
) -> float:
    num_reqs, num_positions = (int(n) for n in rng.integers(1, 4, 2))
    alpha = rng.random((num_reqs, num_positions)) ** rng.choice([0.1, 0.5, 1, 2])
    survival = np.cumprod(alpha, axis=1)
    missing = rng.choice(missing_rows, num_reqs)
    draft = random_table(rng, float(rng.choice([0.1, 0.5, 1.0])))
    costs = StepCosts(random_table(rng, 1), draft, float(rng.choice([0, 1, 4])))
    prefill = int(rng.choice([0, 0, 5]))
    copies = random_copies(rng, num_reqs) if with_copies else None
    steps = float(rng.uniform(1, MOST_STEPS))
    case = (survival, missing, num_reqs, prefill, costs)
    found = plan(*case, copies=copies, catch_up_steps=steps)

    def worth(lens: Sequence[int]) -> float:
        case = (survival, missing.tolist(), prefill, costs, copies, steps)
        return tokens_per_ms(lens, *case)

    assert found.tokens_per_ms == pytest.approx(worth(found.draft_lens.tolist()))
    return found.tokens_per_ms / max(map(worth, all_lengths(num_reqs, num_positions)))


def test_plan_is_close_to_the_best_of_all_lengths() -> None:
    """Steady drafting: at most what was fully accepted is missing."""
    rng = np.random.default_rng(0)
    shares = [share_of_best(rng, (1, 2, 3)) for _ in range(500)]
    assert min(shares) >= 0.97
    assert np.mean(shares) >= 0.999


def test_plan_is_close_to_the_best_where_much_is_missing() -> None:
    rng = np.random.default_rng(1)
    shares = [share_of_best(rng, (1, 2, 50, 300)) for _ in range(500)]
    assert np.quantile(shares, 0.01) >= 0.97
    assert min(shares) >= 0.9


@property_test
@given(survivals(), st.integers(0, 5), st.integers(0, 3), tables(), st.floats(0, 9))
def test_no_other_lengths_of_copies_earn_more(
    gains: np.ndarray,
    num_prefill_rows: int,
    num_other_tokens: int,
    target: CostTable,
    fixed_ms: float,
) -> None:
    num_reqs, longest = gains.shape
    costs = StepCosts(target, FREE, fixed_ms)
    base_tokens = float(num_reqs + num_other_tokens)
    found = plan_copies(gains, num_reqs, num_prefill_rows, costs, base_tokens)

    def earned(lens: Sequence[int]) -> float:
        base_rows = num_reqs + num_prefill_rows
        more_ms = ms(target, base_rows + sum(lens)) - ms(target, base_rows)
        tokens = base_tokens + sum(gains[i, :n].sum() for i, n in enumerate(lens))
        return float(tokens / (fixed_ms + ms(target, num_reqs) + more_ms))

    best = max(earned(lens) for lens in all_lengths(num_reqs, longest))
    assert found.tokens_per_ms == pytest.approx(best)
    assert earned(found.draft_lens.tolist()) == pytest.approx(best)
    assert (found.draft_lens <= (gains > 0).sum(axis=1)).all()


FREE = CostTable([1], [0.0])


def test_plan_is_close_to_the_best_where_others_could_copy() -> None:
    rng = np.random.default_rng(2)
    shares = [share_of_best(rng, (1, 2, 50), with_copies=True) for _ in range(500)]
    assert np.quantile(shares, 0.01) >= 0.97
    assert min(shares) >= 0.85


COSTS = StepCosts(CostTable([1, 64], [20.0, 40.0]), CostTable([1, 64], [2.0, 4.0]), 4.0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_plan_of_nobody_or_of_no_drafts(shape: tuple[int, int]) -> None:
    found = plan(np.zeros(shape), np.ones(shape[0]), shape[0], 0, COSTS)
    assert found.draft_lens.tolist() == [0] * shape[0]
    found = plan_copies(np.zeros(shape), shape[0], 0, COSTS, float(shape[0]))
    assert found.draft_lens.tolist() == [0] * shape[0]


def test_plan_where_all_is_free() -> None:
    free = StepCosts(CostTable([1], [0.0]), CostTable([1], [0.0]), 0.0)
    assert plan(np.ones((2, 3)), np.ones(2), 2, 0, free).draft_lens.tolist() == [3, 3]
    assert plan(np.zeros((1, 3)), np.ones(1), 0, 5, free).draft_lens.tolist() == [0]


@pytest.mark.parametrize("which", ["target", "draft"])
def test_plan_where_one_forward_takes_for_ever(which: str) -> None:
    costs = StepCosts(COSTS.target, COSTS.draft, COSTS.fixed_ms)
    setattr(
        costs, which, CostTable([2, 3] if which == "target" else [1, 2], [1.0, 1e9])
    )
    found = plan(np.full((2, 3), 0.9), np.ones(2), 2, 0, costs)
    assert found.draft_lens.sum() == {"target": 0, "draft": 3}[which]


def test_what_drafting_costs_besides_its_forwards_is_charged_to_who_drafts() -> None:
    survival = np.full((2, 1), 0.5)
    cheap = StepCosts(CostTable([1], [20.0]), CostTable([1], [1.0]), 4.0)
    dear = StepCosts(cheap.target, cheap.draft, 4.0, speculation_ms=20.0)
    assert plan(survival, np.ones(2), 2, 0, cheap).draft_lens.tolist() == [1, 1]
    found = plan(survival, np.ones(2), 2, 0, dear)
    assert found.draft_lens.tolist() == [0, 0]
    assert found.tokens_per_ms == 2 / 24
    worth_it = plan(np.ones((2, 1)), np.ones(2), 2, 0, dear)
    assert worth_it.tokens_per_ms == 4 / (24 + 20 + 1)


def test_survival_one_and_zero() -> None:
    survival = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    found = plan(survival, np.ones(2), 2, 0, COSTS)
    assert found.draft_lens.tolist() == [3, 0]


def test_single_request_single_position() -> None:
    for acceptance, wanted in ((0.9, 1), (0.01, 0)):
        found = plan(np.array([[acceptance]]), np.ones(1), 1, 0, COSTS)
        assert found.draft_lens.tolist() == [wanted]


def test_prompts_in_the_step_do_not_make_drafts_cheap() -> None:
    """A prompt costs what it costs; a token saved is worth a plain step's time."""
    costs = StepCosts(CostTable([1, 1000], [1.0, 1000.0]), COSTS.draft, 4.0)
    survival = np.full((8, 2), 0.5)
    alone = plan(survival, np.ones(8), 8, 0, costs)
    beside = plan(survival, np.ones(8), 8, 500, costs)
    assert alone.draft_lens.tolist() == beside.draft_lens.tolist() == [0] * 8
    assert alone.tokens_per_ms == beside.tokens_per_ms


def test_what_others_draft_makes_time_dear() -> None:
    """One request may draft; seven others copy, four tokens each of five rows."""
    costs = StepCosts(CostTable([1, 100], [40.0, 60.0]), CostTable([1], [2.0]), 2.0)
    survival = np.zeros((8, 2))
    survival[0] = 0.9, 0.8
    missing = np.ones(8, dtype=np.int64)
    alone = plan(survival, missing, 8, 0, costs)
    assert alone.draft_lens.sum() > 0
    others = np.arange(8) > 0
    copies = Copies(np.where(others, 5, 0), np.where(others, 4.0, 0.0))
    beside = plan(survival, missing, 8, 0, costs, copies=copies)
    assert beside.draft_lens.sum() == 0
    assert beside.tokens_per_ms > 3 * alone.tokens_per_ms


def test_prompts_move_the_target_along_its_staircase() -> None:
    costs = StepCosts(CostTable([8, 64, 65, 80], [9, 9, 90, 99]), COSTS.draft, 4.0)
    survival = np.full((8, 1), 0.9)
    assert plan(survival, np.ones(8), 8, 0, costs).draft_lens.sum() == 8
    assert plan(survival, np.ones(8), 8, 56, costs).draft_lens.sum() == 0


def test_one_long_catch_up_does_not_keep_the_others_from_drafting() -> None:
    survival = np.full((16, 4), 0.8) ** np.arange(1, 5)
    missing = np.array([20_000] + [1] * 15)
    found = plan(survival, missing, 16, 0, COSTS)
    assert found.draft_lens[0] == 0
    assert (found.draft_lens[1:] > 0).all()


def test_a_new_prompt_is_caught_up_where_that_pays_over_many_steps() -> None:
    """Its 300 rows cost more than the first step's drafts earn."""
    survival = np.full((1, 4), 0.8) ** np.arange(1, 5)
    draft_ms = ms(COSTS.draft, 300)
    assert draft_ms * 1 / 24 > 0.4
    assert plan(survival, np.array([300]), 1, 0, COSTS).draft_lens[0] > 0


def test_a_catch_up_that_soon_must_be_made_again_is_charged_in_full() -> None:
    survival, missing = np.full((1, 4), 0.8) ** np.arange(1, 5), np.array([2000])
    assert plan(survival, missing, 1, 0, COSTS, catch_up_steps=8).draft_lens[0] > 0
    assert plan(survival, missing, 1, 0, COSTS, catch_up_steps=1).draft_lens[0] == 0


# ---------------------------------------------------------------- one more forward


@property_test
@given(
    st.lists(st.tuples(PROBABILITIES, PROBABILITIES), max_size=6),
    st.integers(0, 8),
    tables(),
    tables(),
    st.floats(0, 3),
)
def test_no_other_requests_go_on_better(
    drafts: list[tuple[float, float]],
    verify_rows: int,
    target: CostTable,
    draft: CostTable,
    price: float,
) -> None:
    survival, following = np.array(drafts).reshape(-1, 2).T
    verify_ms = target.from_to(verify_rows, verify_rows + len(drafts))

    def profit(goes_on: Sequence[bool]) -> float:
        count = sum(goes_on)
        time = ms(draft, count) + ms(target, verify_rows + count)
        return (
            float((survival * following)[np.array(goes_on, bool)].sum()) - price * time
        )

    found = worth_another_forward(survival * following, draft, verify_ms, price)
    assert found.dtype == bool
    assert found.shape == (len(drafts),)
    assert not found[survival * following == 0].any()
    best = max(map(profit, itertools.product([False, True], repeat=len(drafts))))
    assert profit(found.tolist()) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_a_draft_that_is_seldom_verified_seldom_costs_a_row() -> None:
    """4 ms a step and 1 a row: a gain of 0.8 does not pay a row, but half a one."""
    costs = StepCosts(CostTable([4, 8], [4.0, 8.0]), CostTable([1], [0.1]), 0.0)
    gains, missing = np.full((4, 1), 0.8), np.ones(4)
    assert plan(gains, missing, 4, 0, costs).draft_lens.tolist() == [0] * 4
    half = np.full((4, 1), 0.5)
    found = plan(gains, missing, 4, 0, costs, verify_rows=half)
    assert found.draft_lens.tolist() == [1] * 4
    assert found.tokens_per_ms == pytest.approx((4 + 3.2) / (4 + 2 + 0.1))


def test_nothing_is_compiled_once_steps_are_planned() -> None:
    """One kind of arrays goes into the search, whoever calls: no step waits seconds."""
    goodput.get_ready()
    searches = (plan_search.search, plan_search.worth_another_forward)
    compiled = [list(search.signatures) for search in searches]
    assert [len(signatures) for signatures in compiled] == [1, 1]
    rng = np.random.default_rng(3)
    for with_copies in (False, True):
        share_of_best(rng, (1, 50), with_copies)
    plan(np.ones((3, 2)).T, np.ones(2, dtype=np.int32), 2, 0, COSTS)
    rows = np.broadcast_to(0.5, (2, 2))
    plan(np.ones((2, 2)), np.ones(2), 2, 1, COSTS, base_tokens=4.0, verify_rows=rows)
    prices = COSTS.target.from_to(2, 9)
    worth_another_forward(np.ones((2, 2))[:, 0], COSTS.draft, prices[3:], 0.1)
    assert [search.signatures for search in searches] == compiled


def test_compiled_code_does_not_keep_a_worker_from_starting() -> None:
    """A CPU worker of vLLM's looks at all that the modules of its process hold."""
    dispatcher = pytest.importorskip("vllm.triton_utils.dispatcher")
    goodput.get_ready()
    dispatcher._rebind_kernels([])
