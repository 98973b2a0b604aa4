"""Few row counts, all with kernels from the start, and next to no rows more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.forward_context import BatchDescriptor

from vllm_emssd.integration.cpu.onednn_cache import MAX_ROW_COUNTS
from vllm_emssd.integration.cpu.row_padding import (
    ROW_COUNTS,
    PaddedRowsMixin,
    RowPadding,
    next_row_count,
)

TIMES = (  # by rows: two passes, and one whose differences are small
    {1: 30.0, 16: 36.0, 24: 50.0, 32: 52.0, 40: 41.0, 64: 49.0, 128: 90.0},
    {1: 31.0, 16: 36.0, 24: 47.0, 32: 48.0, 40: 38.0, 64: 66.0, 128: 88.0},
    {8: 36.0, 16: 34.0, 24: 35.0, 32: 33.0, 48: 30.0, 64: 29.1, 128: 20.0},
)
ROOM = 999  # the engine takes more
TO_ONE_OF_FEW = [(n, ROOM, n) for n in (0, 1, 15, 16, 160, 512)]
TO_ONE_OF_FEW += [(17, ROOM, 20), (65, ROOM, 72), (161, ROOM, 168), (161, 167, 167)]
TO_ONE_OF_FEW += [(161, 161, 161), (300, ROOM, 304), (513, ROOM, 544)]
TO_WHAT_WAS_QUICKER = [(n, ROOM, n) for n in (0, 1, 16, 64)]
TO_WHAT_WAS_QUICKER += [(n, ROOM, 40) for n in (17, 24, 32)]
TO_WHAT_WAS_QUICKER += [(17, 39, 20), (33, 999, 36), (500, ROOM, 512)]
# By a tile at most, and not for noise: of 48 rows, 64 are quicker by 3 %.
BY_A_TILE = [(n, ROOM, n) for n in (8, 16, 48, 64)]
BY_A_TILE += [(17, ROOM, 32), (32, ROOM, 48)]


@pytest.mark.parametrize(
    ("times", "cases"),
    [((), TO_ONE_OF_FEW), (TIMES[:2], TO_WHAT_WAS_QUICKER), (TIMES[2:], BY_A_TILE)],
)
def test_pads_to_one_of_few_that_is_no_slower(
    times: tuple[dict[int, float], ...], cases: list[tuple[int, int, int]]
) -> None:
    samples = [one for measured in times for one in measured.items()]
    padding = RowPadding(samples) if samples else RowPadding()
    for num_rows, most, padded in cases:
        assert padding.padded(num_rows, most) == padded, num_rows


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
    assert len(counts) <= MAX_ROW_COUNTS


@pytest.mark.parametrize("has_amx", [False, True])
def test_larger_counts_are_quicker_with_amx_alone(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool
) -> None:
    """24 rows as 32, measured while other engines started."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has_amx)
    padding = RowPadding.measured([(16, 45.2), (24, 71.0), (32, 66.5), (64, 180.0)])
    assert padding.padded(24, 999) == (32 if has_amx else 24)


QUICKER = RowPadding([(16, 1.0), (32, 3.0), (48, 2.0)])


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
        ({"_has_drafts": False}, 17),
        ({"_row_padding": None}, 17),  # fixed lengths, and while costs are measured
        ({"across_dp": [17, 17]}, 17),
        ({"graph_rows": 32}, 32),
        ({"lora_config": object()}, 17),
        ({"parallel_config": SimpleNamespace(world_size=2)}, 17),
        ({"model_config": SimpleNamespace(is_moe=True)}, 17),
        ({"max_num_tokens": 18}, 18),
        ({"_row_padding": QUICKER}, 48),
        ({"_row_padding": QUICKER, "_has_drafts": False}, 48),
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
