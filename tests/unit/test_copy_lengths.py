"""How much of each copy is verified: against all other lengths, on small cases."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.draft_batches import step_of
from tests.unit.test_planner import step_costs
from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.proposers.copy_lengths import CopyLengths

property_test = settings(max_examples=150, deadline=None, derandomize=True)
FREE = CostTable([1], [0.0])
COSTS = StepCosts(CostTable([1, 4, 512], [20.0, 20.0, 224.0]), FREE, 4.0)


@property_test
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([0.1, 0.5, 0.9])),
        min_size=1,
        max_size=3,
    ),
    step_costs(),
)
def test_no_other_lengths_earn_more(
    copies: list[tuple[int, float]], costs: StepCosts
) -> None:
    made = [n for n, _ in copies]
    confidence = np.repeat([[c] for _, c in copies], 2, axis=1)
    reached = confidence.cumprod(axis=1)

    def rate(lens: tuple[int, ...]) -> float:
        tokens = len(lens) + sum(reached[i, :n].sum() for i, n in enumerate(lens))
        ms = costs.fixed_ms + costs.target.at(len(lens) + sum(lens))
        ms += costs.copying_ms if any(lens) else 0.0
        return float(tokens / max(ms, 1e-6))

    lens = CopyLengths(costs).choose(step_of(len(made), made), confidence)
    best = max(map(rate, itertools.product(*(range(n + 1) for n in made))))
    assert (lens <= made).all()
    assert rate(tuple(lens.tolist())) == pytest.approx(best)


def test_rows_that_would_be_padding_are_used() -> None:
    """Of 2 requests whose likeliest copied token alone is worth its row."""
    costs = replace(COSTS, target=CostTable([1, 2, 512], [20.0, 20.0, 5120.0]))
    confidence = np.array([[0.95, 0.4, 0.4], [0.3, 0.3, 0.3]])
    bare = CopyLengths(costs).choose(step_of(2, [3, 3]), confidence)
    costs = replace(costs, computed_rows=lambda rows: -(-rows // 5) * 5)
    full = CopyLengths(costs).choose(step_of(2, [3, 3]), confidence)
    assert (bare.tolist(), full.tolist()) == ([1, 0], [2, 1])
    nothing = CopyLengths(costs).choose(step_of(2, [3, 3]), confidence * 0)
    assert nothing.tolist() == [0, 0]


def test_without_costs_all_is_verified() -> None:
    lens = CopyLengths().choose(step_of(2, [3, 0]), np.full((2, 3), 0.01))
    assert lens.tolist() == [3, 0]


def test_copies_that_are_never_right_are_given_up_but_tried_now_and_then() -> None:
    lengths, verified = CopyLengths(COSTS), []
    for _ in range(400):
        lens = lengths.choose(step_of(16, 7), np.full((16, 7), 0.9))
        for i, num_drafts in enumerate(lens.tolist()):
            lengths.observe(f"r{i}", num_drafts, 0)
        verified.append(int(lens.sum()))
    assert verified[0] > 16
    assert 0 < sum(verified[100:]) <= 300 / 32 + 1


def test_copies_that_turn_right_are_believed_again() -> None:
    lengths, step = CopyLengths(COSTS), step_of(16, 7)
    for right in (0, 1):
        for _ in range(3000):
            lens = lengths.choose(step, np.full((16, 7), 0.9))
            for i, num_drafts in enumerate(lens.tolist()):
                lengths.observe(f"r{i}", num_drafts, num_drafts * right)
    assert (lens > 3).all()


def test_copies_that_were_not_used_teach_nothing_and_are_forgotten() -> None:
    lengths = CopyLengths(COSTS)
    lengths.choose(step_of(2, 7), np.full((2, 7), 0.97))
    before = lengths._calibration._counts.copy()
    lengths.observe("r0", 0, 0)
    lengths.release("r1")
    assert lengths._verified == {}
    assert (lengths._calibration._counts == before).all()


def test_each_decision_is_shown_before_it_is_acted_on() -> None:
    shown: list[list[int]] = []
    lengths = CopyLengths(COSTS, lambda decision: shown.append(decision.tolist()))
    for made in ([7, 7], [0, 0]):
        lens = lengths.choose(step_of(2, made), np.full((2, 7), 0.97))
        assert shown.pop() == lens.tolist()
