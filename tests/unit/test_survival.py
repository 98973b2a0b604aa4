"""Acceptance estimates against synthetic drafts whose true acceptance is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.draft_length import Survival

K = 4
property_test = settings(max_examples=60, deadline=None, derandomize=True)


def acceptance(survival: Survival, confidence: float, req_id: str = "new") -> float:
    factor = survival.request_factors([req_id]).by_confidence
    return float(survival.acceptance(np.array([confidence]), factor)[0])


def expected(survival: Survival, req_id: str = "new") -> list[float]:
    return survival.expected(survival.request_factors([req_id]).by_position)[0].tolist()


def observe(
    survival: Survival,
    true_acceptance: float,
    num_steps: int,
    *,
    confidence: float = 0.7,
    req_ids: tuple[str, ...] = ("a",),
    seed: int = 0,
) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        for req_id in req_ids:
            accepted = np.logical_and.accumulate(rng.random(K) < true_acceptance)
            survival.observe(req_id, np.full(K, confidence), int(accepted.sum()))
        survival.request_factors([])  # a step takes in what the last one verified


def test_before_any_data_confidence_is_believed() -> None:
    survival = Survival(K)
    for confidence in (0.1, 0.5, 0.9):
        assert acceptance(survival, confidence) == pytest.approx(confidence)
    start = expected(survival)
    assert start == sorted(start, reverse=True)
    assert 0.5 < start[-1] < start[0] < 1, "hopeful, so that it is tried"


@pytest.mark.parametrize("true_acceptance", [0.1, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("confidence", [0.3, 0.9, 0.9999])
def test_learns_what_a_confidence_is_worth(
    true_acceptance: float, confidence: float
) -> None:
    survival = Survival(K)
    observe(survival, true_acceptance, 400, confidence=confidence)
    assert acceptance(survival, confidence) == pytest.approx(true_acceptance, abs=0.1)
    wanted = true_acceptance ** np.arange(1, K + 1)
    assert expected(survival) == pytest.approx(wanted, abs=0.15)


def test_tells_confidences_apart() -> None:
    survival = Survival(1)
    rng = np.random.default_rng(0)
    for i in range(600):
        confidence, true_acceptance = ((0.95, 0.8), (0.6, 0.2))[i % 2]
        accepted = int(rng.random() < true_acceptance)
        survival.observe("a", np.array([confidence]), accepted)
        survival.request_factors([])
    assert acceptance(survival, 0.95) == pytest.approx(0.8, abs=0.12)
    assert acceptance(survival, 0.6) == pytest.approx(0.2, abs=0.12)


def test_drafts_after_the_first_rejected_one_teach_nothing() -> None:
    survival, other = Survival(K), Survival(K)
    survival.observe("a", np.array([0.5, 0.9, 0.9, 0.9]), 0)
    other.observe("a", np.array([0.5, 0.1]), 0)
    assert expected(survival) == expected(other)
    for confidence in (0.1, 0.5, 0.9):
        assert acceptance(survival, confidence) == acceptance(other, confidence)


def test_forgets_after_a_change() -> None:
    survival = Survival(K)
    observe(survival, 0.9, 1000)
    observe(survival, 0.1, 400, seed=1)
    assert acceptance(survival, 0.7) == pytest.approx(0.1, abs=0.1)
    assert expected(survival)[0] == pytest.approx(0.1, abs=0.1)


def test_doubt_keeps_the_estimate_but_lets_it_move() -> None:
    sure, doubtful = Survival(K), Survival(K)
    for survival in (sure, doubtful):
        observe(survival, 0.1, 500)
    for _ in range(8):
        doubtful.doubt()
    assert expected(doubtful)[0] == pytest.approx(expected(sure)[0], abs=1e-6)
    assert doubtful.num_tested < 0.1 * sure.num_tested
    observe(sure, 1.0, 8, req_ids=("b",))
    observe(doubtful, 1.0, 8, req_ids=("b",))
    assert expected(doubtful)[0] > 0.4 > expected(sure)[0]


def test_each_request_has_a_factor_of_its_own() -> None:
    survival = Survival(K)
    for i in range(60):
        observe(survival, 0.9, 1, req_ids=("good",), seed=i)
        observe(survival, 0.2, 1, req_ids=("bad",), seed=1000 + i)
    for estimate in (
        lambda r: acceptance(survival, 0.7, r),
        lambda r: expected(survival, r)[0],
    ):
        assert estimate("good") > 0.6 > 0.4 > estimate("bad")
        assert estimate("good") > estimate("new") > estimate("bad")


def test_calibrated_confidence_still_leaves_requests_apart_before_drafting() -> None:
    """One is predictable and knows it, one is not and knows it."""
    survival = Survival(1)
    rng = np.random.default_rng(0)
    for _ in range(150):
        for req_id, p in (("good", 0.9), ("bad", 0.15)):
            survival.observe(req_id, np.array([p]), int(rng.random() < p))
        survival.request_factors([])
    factors = survival.request_factors(["good", "bad"])
    assert factors.by_confidence == pytest.approx([1, 1], abs=0.35)
    assert expected(survival, "good")[0] > 0.7 > 0.35 > expected(survival, "bad")[0]


def test_skipped_request_sinks_back_to_the_pool() -> None:
    survival = Survival(K)
    observe(survival, 0.9, 200, req_ids=("good",))
    observe(survival, 0.0, 30, req_ids=("bad",))
    before = survival.request_factors(["bad"]).by_position[0]
    for _ in range(200):
        survival.skip(["bad", "unheard of"])
    after = survival.request_factors(["bad"]).by_position[0]
    assert before < 0.7 < 0.95 < after <= 1


def test_trimmed_drafts_lower_what_is_expected_but_not_calibration() -> None:
    survival = Survival(2)
    calibrated = acceptance(survival, 0.2)
    for _ in range(100):
        survival.observe_trimmed("a", 0, np.array([0.2, 0.2]))
    assert expected(survival)[0] == pytest.approx(0.2, abs=0.05)
    assert acceptance(survival, 0.2) == pytest.approx(calibrated, abs=0.02)
    assert survival.request_factors(["a"]).by_confidence == pytest.approx(1, abs=0.01)


def test_release_forgets_the_request_not_the_pool() -> None:
    survival = Survival(K)
    observe(survival, 0.9, 100, req_ids=("good",))
    observe(survival, 0.1, 20, req_ids=("a",))
    pooled = expected(survival)
    assert expected(survival, "a") != pooled
    survival.release("a")
    survival.release("unheard of")
    assert expected(survival, "a") == pooled
    assert survival.request_factors(["a", "b"]).by_confidence.tolist() == [1, 1]


def test_release_right_after_observing_leaves_nothing_behind() -> None:
    survival = Survival(K)
    survival.observe("a", np.full(K, 0.9), 0)
    survival.release("a")
    assert survival.request_factors(["a"]).by_position.tolist() == [1]
    assert survival.num_tested > Survival(K).num_tested


def test_no_drafts_have_no_effect() -> None:
    survival, untouched = Survival(K), Survival(K)
    survival.observe("a", np.zeros(0), 0)
    assert expected(survival, "a") == expected(untouched, "a")
    assert acceptance(survival, 0.5, "a") == acceptance(untouched, 0.5, "a")


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, list[float], int]]:
    confidences = st.lists(st.floats(0, 1), max_size=K)
    verified = st.tuples(st.sampled_from("abc"), confidences, st.integers(0, K))
    return [
        (req_id, seen, min(accepted, len(seen)))
        for req_id, seen, accepted in draw(st.lists(verified, max_size=40))
    ]


@property_test
@given(histories(), st.floats(0, 1))
def test_probabilities_stay_within_bounds(
    history: list[tuple[str, list[float], int]], confidence: float
) -> None:
    survival = Survival(K)
    for req_id, seen, accepted in history:
        survival.observe(req_id, np.array(seen), accepted)
        if accepted == 1:
            survival.doubt()
        if accepted == 2:
            survival.skip([req_id])
    for req_id in "abcd":
        assert 0 < acceptance(survival, confidence, req_id) < 1
        found = expected(survival, req_id)
        assert found == sorted(found, reverse=True)
        assert 0 < found[-1] <= found[0] < 1
        factor = survival.request_factors([req_id]).by_position
        alpha = survival.acceptance_by_position(factor)
        assert ((alpha > 0) & (alpha < 1)).all()


@property_test
@given(histories())
def test_same_history_same_estimates(
    history: list[tuple[str, list[float], int]],
) -> None:
    first, second = Survival(K), Survival(K)
    for survival in (first, second):
        for req_id, seen, accepted in history:
            survival.observe(req_id, np.array(seen), accepted)
            survival.request_factors([])
    for req_id in "abcd":
        assert expected(first, req_id) == expected(second, req_id)
        assert acceptance(first, 0.5, req_id) == acceptance(second, 0.5, req_id)


def test_empty_batch() -> None:
    survival = Survival(K)
    factors = survival.request_factors([])
    assert survival.expected(factors.by_position).shape == (0, K)
    assert survival.acceptance(np.zeros(0), factors.by_confidence).shape == (0,)
