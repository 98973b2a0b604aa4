"""Acceptance learned from verified drafts: by depth, and by confidence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.draft_length.acceptance import AcceptanceEstimator, Calibration

property_test = settings(max_examples=100, deadline=None, derandomize=True)
UNIT = st.floats(0, 1)


def made(*confidence: float) -> np.ndarray:
    return np.array(confidence, dtype=np.float64)


def learn(estimator: AcceptanceEstimator, *observed: tuple[np.ndarray, int]) -> None:
    """All were verified, and so many accepted."""
    for drafts, num_accepted in observed:
        estimator.observe(drafts, len(drafts), num_accepted)
    estimator.update()


def first(estimator: AcceptanceEstimator, confidence: float) -> float:
    return float(estimator.survival(np.array([confidence]), 1.0)[0])


def test_what_was_never_tried_is_expected_to_be_good() -> None:
    """Or it would never be tried: whatever its confidence and depth."""
    estimator = AcceptanceEstimator(4)
    assert estimator.by_depth.tolist() == pytest.approx([0.9] * 4)
    for confidence in (0.0, 0.5, 1.0):
        assert first(estimator, confidence) == pytest.approx(0.9)


def test_learns_each_depth() -> None:
    estimator = AcceptanceEstimator(3)
    for i in range(600):
        learn(estimator, (made(0.5, 0.5, 0.5), (3, 3, 1, 0)[i % 4]))
    assert estimator.by_depth == pytest.approx([3 / 4, 2 / 3, 1.0], abs=0.05)


def test_a_depth_not_reached_is_like_the_one_before() -> None:
    estimator = AcceptanceEstimator(4)
    for i in range(400):
        learn(estimator, (made(0.5, 0.5), 2 * (i % 2)))
    assert estimator.by_depth[1] > 0.95
    assert estimator.by_depth[2:] == pytest.approx([estimator.by_depth[1]] * 2)


@pytest.mark.parametrize("true", [0.05, 0.4, 0.95])
def test_learns_what_a_confidence_is_worth_and_not_of_others(true: float) -> None:
    estimator, dice = AcceptanceEstimator(1), np.random.default_rng(1)
    for _ in range(500):
        learn(estimator, (made(0.45), int(dice.random() < true)), (made(0.97), 1))
    assert first(estimator, 0.45) == pytest.approx(true, abs=0.08)
    assert first(estimator, 0.96) > 0.95


def test_drafts_after_the_first_rejected_one_teach_nothing() -> None:
    one, three = AcceptanceEstimator(3), AcceptanceEstimator(3)
    for _ in range(50):
        learn(one, (made(0.5), 0))
        learn(three, (made(0.5, 0.9, 0.9), 0))
    assert one.by_depth.tolist() == three.by_depth.tolist()
    assert first(one, 0.9) == first(three, 0.9)


def test_drafts_without_confidence_teach_their_depth() -> None:
    estimator = AcceptanceEstimator(2)
    for _ in range(300):
        estimator.observe(None, 2, 1)
        estimator.update()
    assert estimator.by_depth[0] > 0.97
    assert estimator.by_depth[1] < 0.03
    assert first(estimator, 0.5) == pytest.approx(estimator._mean)


def test_a_whole_step_teaches_what_its_requests_do_one_by_one() -> None:
    one_by_one, at_once = AcceptanceEstimator(4), AcceptanceEstimator(4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        num_drafts = rng.integers(0, 5, 6)
        num_accepted = rng.integers(0, num_drafts + 1)
        for drafts, accepted in zip(num_drafts, num_accepted, strict=True):
            one_by_one.observe(None, int(drafts), int(accepted))
        one_by_one.update()
        at_once.observe_step(num_drafts, num_accepted)
    assert at_once.by_depth == pytest.approx(one_by_one.by_depth)
    assert at_once.by_depth[0] != AcceptanceEstimator(4).by_depth[0]


def test_trimmed_drafts_count_as_their_confidence_says() -> None:
    """What is always trimmed must not go on being drafted; but nothing is known of
    its confidence that was not known before."""
    estimator = AcceptanceEstimator(2)
    for _ in range(300):
        learn(estimator, (made(0.5), 0))
    before = first(estimator, 0.5)
    trimmed = made(0.97, 0.5)
    for _ in range(1500):
        estimator.observe(trimmed, 1, 1)
        estimator.update()
    assert estimator.by_depth[0] > 0.9
    assert estimator.by_depth[1] < 0.1
    assert first(estimator, 0.5) < before + 0.05


def test_a_trimmed_draft_behind_a_rejected_one_says_nothing() -> None:
    estimator, other = AcceptanceEstimator(2), AcceptanceEstimator(2)
    estimator.observe(made(0.5, 0.5), 1, 0)
    other.observe(made(0.5), 1, 0)
    for e in (estimator, other):
        e.update()
    assert estimator.by_depth.tolist() == other.by_depth.tolist()


def test_forgets_after_a_change() -> None:
    estimator = AcceptanceEstimator(1)
    for accepted in (0, 1):
        for _ in range(3000):
            learn(estimator, (made(0.5), accepted))
        assert estimator.by_depth[0] == pytest.approx(accepted, abs=0.02)
        assert first(estimator, 0.5) == pytest.approx(accepted, abs=0.3)


def test_doubt_keeps_the_estimate_but_lets_it_move() -> None:
    sure, doubtful = AcceptanceEstimator(1), AcceptanceEstimator(1)
    for estimator in (sure, doubtful):
        for i in range(500):
            learn(estimator, (made(0.5), int(i % 5 == 0)))
    before = doubtful.by_depth[0]
    doubtful.doubt()
    assert doubtful.by_depth[0] == pytest.approx(before)
    for estimator in (sure, doubtful):
        learn(estimator, (made(0.5), 1))
    assert doubtful.by_depth[0] - before > 20 * (sure.by_depth[0] - before)


@property_test
@given(st.lists(st.tuples(st.lists(UNIT, max_size=3), st.integers(0, 3)), max_size=20))
def test_estimates_are_probabilities_and_survival_never_grows(
    observed: list[tuple[list[float], int]],
) -> None:
    estimator = AcceptanceEstimator(3)
    for confidence, num_accepted in observed:
        learn(estimator, (made(*confidence), min(num_accepted, len(confidence))))
    assert ((estimator.by_depth >= 0) & (estimator.by_depth <= 1)).all()
    confidence = np.linspace(0, 1, 30)
    survival = estimator.survival(confidence, 0.7)
    assert ((survival >= 0) & (survival < 0.7)).all()


@property_test
@given(UNIT, UNIT)
def test_an_unseen_confidence_has_its_prior(confidence: float, prior: float) -> None:
    found = Calibration().acceptance(np.array([confidence]), prior)
    assert found == pytest.approx([min(prior, 0.995)])
