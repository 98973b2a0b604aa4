"""What drafting will tell, from what it told before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from vllm_emssd.draft_length.anticipation import Anticipation

HALF = np.array([[0.5]])


def told(expected: float, *found: float, times: int = 20) -> Anticipation:
    """One position; drafts turned out as given, in turns."""
    anticipation = Anticipation(1)
    for _ in range(times):
        for one in found:
            anticipation.observe(np.array([[expected]]), np.array([[one]]))
    return anticipation


def test_nothing_is_anticipated_of_a_few() -> None:
    gains, rows = told(0.5, 0.1, 0.9, times=7).gains_and_rows(HALF, 0.6)
    assert (gains.tolist(), rows.tolist()) == ([[0.5]], [[1.0]])


def test_half_of_the_drafts_turn_out_well_and_only_they_are_verified() -> None:
    gains, rows = told(0.5, 0.1, 0.9).gains_and_rows(HALF, 0.6)
    assert gains[0, 0] == pytest.approx(0.9 / 2)
    assert rows[0, 0] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("least_gain", "gain", "row"), [(0.0, 0.5, 1.0), (0.05, 0.5, 1.0), (0.95, 0, 0)]
)
def test_all_or_nothing_is_verified(least_gain: float, gain: float, row: float) -> None:
    gains, rows = told(0.5, 0.1, 0.9).gains_and_rows(HALF, least_gain)
    assert gains[0, 0] == pytest.approx(gain)
    assert rows[0, 0] == pytest.approx(row)


def test_only_the_latest_count() -> None:
    anticipation = told(0.5, 0.1, 0.9)
    for _ in range(64):
        anticipation.observe(HALF, HALF)
    gains, rows = anticipation.gains_and_rows(HALF, 0.4)
    assert (gains.tolist(), rows.tolist()) == ([[0.5]], [[1.0]])


def test_drafts_not_made_are_as_the_last_one_that_was() -> None:
    """Who stopped early looked bad: deep drafts alone would flatter."""
    anticipation = Anticipation(2)
    expected = np.array([[0.8, 0.64]] * 2)
    for _ in range(20):
        anticipation.observe(expected, np.array([[1.0, 0.8], [0.6, 0.0]]))
    gains, rows = anticipation.gains_and_rows(expected[:1], 0.6)
    assert gains[0] == pytest.approx([0.8, 0.4])
    assert rows[0] == pytest.approx([1.0, 0.5])


def test_more_requests_at_once_than_are_remembered() -> None:
    anticipation = Anticipation(1)
    anticipation.observe(np.full((100, 1), 0.5), np.full((100, 1), 0.5))
    assert anticipation.gains_and_rows(HALF, 0.4)[0] == pytest.approx(0.5)


shares = st.floats(0.01, 1.0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    npst.arrays(float, (30, 3), elements=shares),
    npst.arrays(float, (4, 3), elements=shares),
    st.floats(0, 1),
)
def test_gains_do_not_grow_and_are_no_more_than_expected(
    found: np.ndarray, alpha: np.ndarray, least_gain: float
) -> None:
    anticipation, gains = Anticipation(3), np.cumprod(alpha, axis=1)
    anticipation.observe(np.full((30, 3), 0.3), np.cumprod(found, axis=1))
    gained, rows = anticipation.gains_and_rows(gains, least_gain)
    assert (np.diff(gained, axis=1) <= 1e-12).all()
    assert (gained <= gains + 1e-9).all()
    assert ((rows >= 0) & (rows <= 1)).all()
    # To verify what is worth its row is better than to verify all of it, or none.
    assert (gained >= np.minimum.accumulate(rows * least_gain, axis=1) - 1e-9).all()
