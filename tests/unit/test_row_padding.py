"""Few row counts, all with kernels from the start, and next to no rows more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.forward_context import BatchDescriptor

from vllm_emssd.integration.cpu.onednn_cache import MOST_ROW_COUNTS
from vllm_emssd.integration.cpu.row_padding import (
    ROW_COUNTS,
    PaddedRowsMixin,
    RowPadding,
    next_row_count,
)


@pytest.mark.parametrize(
    ("num_rows", "most", "padded"),
    [
        (0, 999, 0),
        (1, 999, 1),
        (15, 999, 15),
        (16, 999, 16),
        (17, 999, 20),
        (65, 999, 72),
        (160, 999, 160),
        (161, 999, 168),
        (161, 167, 167),  # the engine takes no more
        (161, 161, 161),
        (300, 999, 304),
        (512, 999, 512),
        (513, 999, 544),
    ],
)
def test_pads_to_one_of_few(num_rows: int, most: int, padded: int) -> None:
    assert RowPadding().padded(num_rows, most) == padded


@given(st.integers(0, 5000), st.integers(0, 600))
def test_adds_few_rows_and_never_more_than_there_is_room(
    num_rows: int, room: int
) -> None:
    padded = RowPadding().padded(num_rows, num_rows + room)
    assert num_rows <= padded <= num_rows + min(room, 31)
    assert padded <= 1.18 * num_rows


def test_layers_keep_the_kernels_of_all_of_them_and_of_prompts() -> None:
    counts = {next_row_count(rows) for rows in range(1, 4097)}
    assert counts >= set(ROW_COUNTS)
    assert len(counts) <= MOST_ROW_COUNTS


@pytest.mark.parametrize("has_amx", [False, True])
def test_larger_counts_are_quicker_with_amx_alone(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool
) -> None:
    """24 rows as 32, measured while other engines started."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has_amx)
    padding = RowPadding.measured([(16, 45.2), (24, 71.0), (32, 66.5), (64, 180.0)])
    assert padding.padded(24, 999) == (32 if has_amx else 24)


PASSES = (
    {1: 30.0, 16: 36.0, 24: 50.0, 32: 52.0, 40: 41.0, 64: 49.0, 128: 90.0},
    {1: 31.0, 16: 36.0, 24: 47.0, 32: 48.0, 40: 38.0, 64: 66.0, 128: 88.0},
)


@pytest.mark.parametrize(
    ("num_rows", "most", "padded"),
    [
        (0, 999, 0),
        (1, 999, 1),
        (16, 999, 16),
        (17, 999, 40),
        (24, 999, 40),
        (32, 999, 40),
        (17, 39, 20),  # the engine takes no more
        (33, 999, 36),
        (64, 999, 64),
        (500, 999, 512),
    ],
)
def test_pads_to_what_was_quicker(num_rows: int, most: int, padded: int) -> None:
    samples = [one for times in PASSES for one in times.items()]
    assert RowPadding(samples).padded(num_rows, most) == padded


@pytest.mark.parametrize(
    ("num_rows", "padded"),
    [
        (8, 8),  # few row counts
        (16, 16),
        (17, 32),
        (32, 48),
        (48, 48),  # 64 is quicker by 3 %
        (64, 64),  # 128 is more than a tile away: what was noise would cost much
    ],
)
def test_pads_by_a_tile_at_most_and_not_for_noise(num_rows: int, padded: int) -> None:
    times = {8: 36.0, 16: 34.0, 24: 35.0, 32: 33.0, 48: 30.0, 64: 29.1, 128: 20.0}
    assert RowPadding(times.items()).padded(num_rows, 999) == padded


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
        self._row_padding = RowPadding()


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 20),
        ({"_row_padding": None}, 17),  # fixed lengths, and while costs are measured
        ({"across_dp": [17, 17]}, 17),
        ({"graph_rows": 32}, 32),
        ({"lora_config": object()}, 17),
        ({"parallel_config": SimpleNamespace(world_size=2)}, 17),
        ({"model_config": SimpleNamespace(is_moe=True)}, 17),
        ({"max_num_tokens": 18}, 18),
        ({"_row_padding": RowPadding([(16, 1.0), (32, 3.0), (48, 2.0)])}, 48),
    ],
)
def test_only_where_padding_rows_change_nothing(
    changes: dict[str, Any], rows: int
) -> None:
    runner = Runner()
    for name, value in changes.items():
        setattr(runner, name, value)
    mode, batch, *_ = runner._determine_batch_execution_and_padding(17, num_reqs=3)
    assert (mode, batch.num_tokens) == ("mode", rows)
