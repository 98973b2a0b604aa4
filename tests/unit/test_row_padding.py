"""Rows of no request are computed along only where they cost next to nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.forward_context import BatchDescriptor

from vllm_emssd.draft_length import CostTable
from vllm_emssd.integration.cpu.row_padding import PaddedRowsMixin, RowPadding

FLAT = CostTable([1, 256], [50.0, 50.0])
CHEAP = CostTable([1, 257], [30.0, 81.2])  # 0.2 ms a row
DEAR = CostTable([1, 257], [1.0, 257.0])  # 1 ms a row, and nothing else


@pytest.mark.parametrize(
    ("num_rows", "most", "costs", "rounded"),
    [
        (0, 999, FLAT, 0),
        (1, 999, FLAT, 1),
        (15, 999, FLAT, 15),
        (16, 999, FLAT, 16),
        (17, 999, FLAT, 24),
        (160, 999, FLAT, 160),
        (161, 999, FLAT, 168),
        (161, 167, FLAT, 164),  # the engine takes no more
        (161, 163, FLAT, 161),
        (150, 999, CHEAP, 152),  # 0.4 of 59.8 ms
        (145, 999, CHEAP, 148),  # 8 would be 1.4 ms more, of 58.8
        (17, 999, CHEAP, 20),
        (161, 999, DEAR, 164),  # 1.9 %
        (17, 999, DEAR, 17),
    ],
)
def test_rounds_where_that_is_cheap(
    num_rows: int, most: int, costs: CostTable, rounded: int
) -> None:
    assert RowPadding().rounded(num_rows, most, costs) == rounded


@given(st.integers(0, 600), st.integers(0, 600), st.floats(0, 3), st.floats(0, 90))
def test_never_dearer_than_two_percent(
    num_rows: int, room: int, row_ms: float, fixed_ms: float
) -> None:
    costs = CostTable([1, 601], [fixed_ms, fixed_ms + 600 * row_ms])
    rounded = RowPadding().rounded(num_rows, num_rows + room, costs)
    assert num_rows <= rounded <= num_rows + min(room, 7)
    assert costs.at(rounded) <= 1.02 * costs.at(num_rows) + 1e-9


PASSES = (
    {1: 30.0, 16: 36.0, 24: 50.0, 32: 52.0, 40: 41.0, 64: 49.0, 128: 90.0},
    {1: 31.0, 16: 36.0, 24: 47.0, 32: 48.0, 40: 38.0, 64: 66.0, 128: 88.0},
)


@pytest.mark.parametrize(
    ("num_rows", "most", "rounded"),
    [
        (0, 999, 0),
        (1, 999, 1),
        (16, 999, 16),
        (17, 999, 40),
        (24, 999, 40),
        (32, 999, 40),
        (17, 39, 17),  # the engine takes no more
        (33, 999, 33),
        (64, 999, 64),
        (500, 999, 504),  # nothing was timed there: where it is cheap
    ],
)
def test_rounds_up_to_what_was_quicker(num_rows: int, most: int, rounded: int) -> None:
    samples = [one for times in PASSES for one in times.items()]
    assert RowPadding(samples).rounded(num_rows, most, DEAR) == rounded


@pytest.mark.parametrize(
    ("num_rows", "rounded"),
    [
        (8, 8),  # few row counts
        (16, 16),
        (17, 32),
        (32, 48),
        (48, 48),  # 64 is quicker by 3 %
        (64, 64),  # 128 is more than a tile away: what was noise would cost much
    ],
)
def test_rounds_up_by_a_tile_at_most_and_not_for_noise(
    num_rows: int, rounded: int
) -> None:
    times = {8: 36.0, 16: 34.0, 24: 35.0, 32: 33.0, 48: 30.0, 64: 29.1, 128: 20.0}
    assert RowPadding(times.items()).rounded(num_rows, 999, DEAR) == rounded


GRID = [(1, 30.0), (64, 42.6), (128, 55.4), (256, 81.0)]  # at CHEAP's prices


def test_borrows_kernels_until_that_has_cost_as_much_as_making_them() -> None:
    rounding = RowPadding(GRID, preparing_ms=30.0)
    # 24 rows beyond 104 cost 4.8 ms each time.
    seen = [rounding.rounded(101, 999, CHEAP) for _ in range(9)]
    assert seen == [128] * 6 + [104] * 3
    assert rounding.rounded(90, 999, CHEAP) == 104, "whose kernels are nearer now"
    assert rounding.rounded(0, 999, CHEAP) == 0
    assert rounding.rounded(101, 103, CHEAP) == 101, "the engine takes no more"


def test_does_not_borrow_a_prompts_kernels_though_that_seems_free() -> None:
    rounding = RowPadding([(n, 50.0) for n in (1, 16, 256)], preparing_ms=1e9)
    assert rounding.rounded(1000, 9999, FLAT) == 1000
    assert rounding.rounded(100, 9999, FLAT) == 256
    assert rounding.rounded(300, 9999, FLAT) == 304


def test_makes_kernels_where_there_are_none_to_borrow() -> None:
    rounding = RowPadding(GRID, preparing_ms=30.0)
    assert rounding.rounded(300, 999, CHEAP) == 304
    assert rounding.rounded(290, 999, CHEAP) == 304


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.floats(0.0, 100.0))
def test_costs_at_most_twice_what_knowing_the_future_would(
    wanted: list[int], preparing_ms: float
) -> None:
    """Beside the best choice for each row count alone: borrow always, or make at once;
    and what rounding to a multiple costs by itself."""
    rounding = RowPadding(GRID, preparing_ms)
    alone = {rows: RowPadding().rounded(rows, 999, CHEAP) for rows in set(wanted)}
    paid, prepared = 0.0, {rows for rows, _ in GRID}
    for rows in wanted:
        used = rounding.rounded(rows, 999, CHEAP)
        paid += CHEAP.at(used) - CHEAP.at(alone[rows])
        paid += preparing_ms * (used not in prepared)
        prepared.add(used)
    best = 0.0
    for rows in set(alone.values()):
        num_times = sum(alone[w] == rows for w in wanted)
        above = [n for n, _ in GRID if n >= rows]
        borrowing = (CHEAP.at(above[0]) - CHEAP.at(rows)) * num_times if above else 1e9
        best += min(borrowing, preparing_ms if rows not in dict(GRID) else 0.0)
    # One more is borrowed before it is seen that it was too much.
    most_a_time = max(CHEAP.at(256) - CHEAP.at(128), 0.0)
    assert paid <= 2 * best + most_a_time * len(set(alone.values())) + 1e-6


class Stock:
    """vLLM's runner, as far as this goes."""

    across_dp: Any = None
    graph_rows = 0

    def _determine_batch_execution_and_padding(
        self, num_tokens: int, num_reqs: int
    ) -> Any:
        assert num_reqs == 3
        batch = BatchDescriptor(max(num_tokens, self.graph_rows))
        return "mode", batch, 0, self.across_dp, None


class Runner(PaddedRowsMixin, Stock):
    max_num_tokens = 2048
    lora_config = None
    parallel_config = SimpleNamespace(world_size=1)
    model_config = SimpleNamespace(is_moe=False)

    def __init__(self) -> None:
        self._step_costs = SimpleNamespace(costs=SimpleNamespace(target=FLAT))
        self._row_padding = RowPadding()


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 24),
        ({"_step_costs": None}, 17),  # fixed lengths, and while costs are measured
        ({"across_dp": [17, 17]}, 17),
        ({"graph_rows": 32}, 32),
        ({"lora_config": object()}, 17),
        ({"parallel_config": SimpleNamespace(world_size=2)}, 17),
        ({"model_config": SimpleNamespace(is_moe=True)}, 17),
        ({"max_num_tokens": 20}, 20),
        ({"_row_padding": RowPadding([(16, 1.0), (32, 3.0), (48, 2.0)])}, 48),
    ],
)
def test_only_where_rows_are_nobody_elses(changes: dict[str, Any], rows: int) -> None:
    runner = Runner()
    for name, value in changes.items():
        setattr(runner, name, value)
    mode, batch, *_ = runner._determine_batch_execution_and_padding(17, num_reqs=3)
    assert (mode, batch.num_tokens) == ("mode", rows)
