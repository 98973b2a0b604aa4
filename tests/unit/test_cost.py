"""Cost tables: straight lines between measured points, never falling, kept fresh."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.draft_length import CostTable

property_test = settings(max_examples=100, deadline=None, derandomize=True)
TIMES = st.floats(0, 1e9, allow_nan=False)


@st.composite
def tables(draw: st.DrawFn) -> CostTable:
    rows = sorted(draw(st.sets(st.integers(1, 300), min_size=1, max_size=8)))
    computed = draw(st.sampled_from([(), recorded(8, 64, 80)]))
    return CostTable(rows, [draw(TIMES) for _ in rows], computed)


def recorded(*sizes: int) -> list[int]:
    """Rows computed of 0, 1, 2, ..., with CUDA graphs of these sizes."""
    return [0, *(next(s for s in sizes if s >= n) for n in range(1, sizes[-1] + 1))]


def ms(table: CostTable, rows: float) -> float:
    return float(table.ms(np.array(rows)))


def test_straight_lines_between_points() -> None:
    table = CostTable([2, 4, 8], [10.0, 20.0, 22.0])
    assert table.ms(np.array([1, 2, 3, 4, 6, 8])).tolist() == [10, 10, 15, 20, 21, 22]


def test_beyond_the_last_point_it_goes_on_as_in_its_upper_half() -> None:
    table = CostTable([1, 4, 8, 16], [1.0, 4.0, 8.0, 16.0])
    assert ms(table, 116) == pytest.approx(116)
    flat_at_the_end = CostTable([4, 8, 15, 16], [4.0, 8.0, 16.0, 16.0])
    assert ms(flat_at_the_end, 24) == pytest.approx(24), "two points may be noise"
    assert ms(CostTable([8], [3.0]), 80) == 3
    assert ms(CostTable([8, 9], [3.0, 4.0]), 10) == 5


@property_test
@given(tables(), st.integers(0, 300))
def test_one_row_count_costs_what_it_costs_among_others(
    table: CostTable, rows: int
) -> None:
    assert table.at(rows) == pytest.approx(ms(table, rows))


def test_rows_cost_what_the_size_costs_that_is_recorded_for_them() -> None:
    """However they are asked for, and after all that was learned of others."""
    rows, asked = [1, 8, 16, 64, 80, 96], np.array([1, 8, 9, 64, 72, 96])
    table = CostTable(rows, rows, recorded(8, 64))
    assert table.ms(asked).tolist() == [8, 8, 64, 64, 72, 96]
    for _ in range(100):
        table.observe(64, 20.0)
    assert ms(table, 9) == table.at(9) == table.at(64) == pytest.approx(20, rel=0.05)
    assert table.at(8) < 10


def test_no_rows_cost_nothing_and_shapes_are_kept() -> None:
    found = CostTable([4], [7.0]).ms(np.array([[0, 1], [4, 9]]))
    assert found.tolist() == [[0, 7], [7, 7]]
    assert CostTable([4], [7.0]).ms(np.array([])).shape == (0,)


def test_falling_measurements_are_lowered() -> None:
    """A time that another process prolonged must not make all larger ones expensive."""
    assert CostTable([1, 2, 3], [5.0, 4.0, 6.0]).points == [(1, 4), (2, 4), (3, 6)]


@pytest.mark.parametrize(
    ("rows", "times"),
    [
        ([], []),
        ([1, 2], [1.0]),
        ([2, 1], [1.0, 2.0]),
        ([1, 1], [1.0, 2.0]),
        ([1, 2], [1.0, math.nan]),
        ([1, 2], [1.0, math.inf]),
    ],
)
def test_refuses_what_is_no_table(rows: list[int], times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"cost table|row counts"):
        CostTable(rows, times)


def test_from_samples_takes_the_quickest() -> None:
    samples = [(4, 9.0), (1, 2.0), (4, 5.0), (1, 1.0), (4, 100.0), (1, 90.0), (4, 7.0)]
    assert CostTable.from_samples(samples).points == [(1, 1), (4, 5)]


ROWS, TIMES_MS = [1, 8, 16, 32, 64], [10.0, 20.0, 30.0, 40.0, 80.0]


@pytest.mark.parametrize(
    ("rows", "took", "moved"),
    [
        (16, 33.0, [16]),
        (16, 27.0, [16]),
        (12, 26.0, [8, 16]),
        (1, 9.0, [1]),
        (70, 90.0, [32, 64]),
    ],
)
def test_observing_moves_the_points_beside(
    rows: int, took: float, moved: list[int]
) -> None:
    """Most; all others, of the same machine, move with them."""
    table = CostTable(ROWS, TIMES_MS)
    before = ms(table, rows)
    table.observe(rows, took)
    changes = {
        point: now / then - 1
        for (point, now), then in zip(table.points, TIMES_MS, strict=True)
    }
    most = max(changes.values(), key=abs)
    assert most * (took - before) > 0
    assert [p for p, c in changes.items() if c == pytest.approx(most)] == moved
    others = [c for p, c in changes.items() if p not in moved]
    assert others == pytest.approx([0.7 * most] * len(others))
    assert abs(ms(table, rows) - took) < abs(before - took)


@pytest.mark.parametrize(
    ("rows", "took"),
    [(16, math.nan), (16, math.inf), (16, -1.0), (16, 1e6), (0, 5.0), (500, 90.0)],
)
def test_what_says_nothing_is_ignored(rows: int, took: float) -> None:
    table = CostTable(ROWS, TIMES_MS)
    table.observe(rows, took)
    assert table.points == list(zip(ROWS, TIMES_MS, strict=True))


def test_one_step_moves_little() -> None:
    table = CostTable(ROWS, TIMES_MS)
    for rows, took in [*zip(ROWS, TIMES_MS, strict=True)] * 20:
        table.observe(rows, took)
    table.observe(16, 30 * 0.51)
    table.observe(64, 80 * 4.9)
    assert ms(table, 16) >= 0.95 * 30
    assert ms(table, 64) <= 1.1 * 80


def test_a_start_in_a_slow_minute_is_soon_unlearned() -> None:
    """A first cost comes from few times, so the first live ones count for more."""
    table = CostTable(ROWS, [ms * 1.6 for ms in TIMES_MS])
    for _ in range(10):
        table.observe(16, 30.0)
    assert ms(table, 16) < 1.2 * 30
    assert ms(table, 64) < 1.35 * 80


def test_much_quicker_than_thought_is_believed_and_casts_doubt_on_the_rest() -> None:
    """As after a start beside another process: else nothing pays, nothing is run, and
    nothing is ever learned."""
    table = CostTable(ROWS, [ms * 15 for ms in TIMES_MS])
    for _ in range(6):
        table.observe(1, 10.0)
    assert ms(table, 1) < 2.1 * 10
    assert ms(table, 64) < 2.1 * 80


def test_a_row_more_costs_no_more_for_a_machine_that_is_slower_than_at_the_start() -> (
    None
):
    """Points never seen since the start stay near the others: their difference is what
    a row costs."""
    table = CostTable([32, 64, 96], [40.0, 80.0, 120.0])
    for _ in range(200):
        table.observe(64, 80 * 1.2)
        table.observe(96, 120 * 1.2)
    assert ms(table, 64) - ms(table, 32) == pytest.approx(40 * 1.2, rel=0.08)


def test_row_counts_computed_as_a_larger_one_cost_what_it_costs() -> None:
    """24 and 32 rows were slower than 40: they are taken for 40, and stay alike."""
    table = CostTable([16, 24, 32, 40, 64], [30.0, 50.0, 52.0, 40.0, 60.0])
    assert [p for p in table.points if p[1] == 40] == [(24, 40), (32, 40), (40, 40)]
    for _ in range(100):
        table.observe(40, 55.0)
        table.observe(16, 30.0)
    assert ms(table, 24) == ms(table, 32) == ms(table, 40)
    assert ms(table, 40) == pytest.approx(55, rel=0.15)


def test_points_that_a_disturbed_start_made_alike_part_again() -> None:
    """24 to 80 rows were measured in a slow minute and 96 in a quick one, so that all
    of them seem to cost what 96 do."""
    rows = [16, 24, 32, 40, 48, 64, 80, 96, 128]
    true = np.array([42.0, 43, 44, 45, 47, 58, 62, 68, 84])
    table = CostTable(rows, true * [1, 1.3, 1.35, 1.4, 1.3, 1.1, 1.05, 0.82, 1])
    assert ms(table, 24) == ms(table, 96)
    dice = np.random.default_rng(0)
    for seen in dice.normal(52, 12, 150).clip(16, 96).astype(int).tolist():
        table.observe(seen, float(np.interp(seen, rows, true) * dice.lognormal(0, 0.1)))
    assert ms(table, 64) - ms(table, 40) > (58 - 45) / 2
    assert ms(table, 48) == pytest.approx(47, rel=0.08)


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.5, 4.0, 50.0])
def test_follows_a_lasting_change(factor: float) -> None:
    """Even one so great that the first times look like outliers."""
    table = CostTable(ROWS, TIMES_MS)
    for _ in range(300):
        table.observe(16, 30 * factor)
    assert ms(table, 16) == pytest.approx(30 * factor, rel=0.05)


def test_noise_does_not_ratchet_a_flat_table_up() -> None:
    rng = np.random.default_rng(0)
    table = CostTable([1, 2, 4, 8], [10.0] * 4)
    for _ in range(2000):
        table.observe(int(rng.choice([1, 2, 4, 8])), float(10 * rng.uniform(0.7, 1.3)))
    for _, cost in table.points:
        assert cost == pytest.approx(10, rel=0.06)


MAD = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 1e6, 1e300)
OBSERVED = st.tuples(
    st.integers(-5, 400) | st.integers(-5, 10**9),
    st.floats(0, 1e4) | st.sampled_from(MAD),
)


@property_test
@given(tables(), st.lists(OBSERVED, max_size=300))
def test_costs_stay_costs_whatever_is_observed(
    table: CostTable, seen: list[tuple[int, float]]
) -> None:
    """However often, and by a clock gone mad: finite, and never falling."""
    for rows, took in seen:
        table.observe(rows, took)
    costs = table.ms(np.arange(400))
    assert np.isfinite(costs).all()
    assert (costs >= 0).all()
    assert (np.diff(costs) >= -1e-9 * costs[1:]).all()


@pytest.mark.parametrize("took", MAD)
def test_madness_that_lasts_is_outlived(took: float) -> None:
    """A thousand absurd times, then sane ones: the table comes back."""
    table = CostTable(ROWS, TIMES_MS)
    for _ in range(1000):
        table.observe(16, took)
    assert np.isfinite(ms(table, 16))
    for _ in range(20_000):
        table.observe(16, 30.0)
        if ms(table, 16) == pytest.approx(30.0, rel=0.1):
            return
    raise AssertionError(f"still {ms(table, 16)} ms, after {took}")


def test_covers_the_rows_that_live_forwards_have() -> None:
    """Beyond its last point a table is a guess until it has points there."""
    table = CostTable([1, 128, 256], [20.0, 40.0, 60.0])
    table.observe(2000, 900.0)
    assert table.points[-1][0] == 256, "too far to say anything of these points"
    expected = ms(table, 2000)
    table.cover(2000)
    assert [rows for rows, _ in table.points] == [1, 128, 256, 512, 1024, 2048]
    assert ms(table, 2000) == pytest.approx(expected), "nothing was observed yet"
    for _ in range(200):
        table.observe(2000, 900.0)
    assert ms(table, 2000) == pytest.approx(900.0, rel=0.05)
    table.cover(100)
    table.cover(2048)
    assert len(table.points) == 6
