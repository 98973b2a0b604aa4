"""Ragged rows against loops over requests and positions."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from vllm_emssd.ragged import RaggedRows

property_test = settings(max_examples=100, deadline=None, derandomize=True)
BLOCK_SIZE, MAX_NUM_REQS, MAX_POSITION = 3, 9, 40


@st.composite
def spans(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Batch row, start and end of each request in a forward; never empty."""
    req_indices = draw(
        st.lists(st.integers(0, MAX_NUM_REQS - 1), unique=True, min_size=1)
    )
    starts = [draw(st.integers(0, MAX_POSITION - 1)) for _ in req_indices]
    ends = [draw(st.integers(start + 1, MAX_POSITION)) for start in starts]
    return list(zip(req_indices, starts, ends, strict=True))


def rows_of(spans: list[tuple[int, int, int]]) -> RaggedRows:
    req_indices, starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    return RaggedRows.from_spans(req_indices, starts, ends)


@property_test
@given(spans())
def test_from_spans_equals_loop(spans: list[tuple[int, int, int]]) -> None:
    rows = rows_of(spans)
    query_start_loc, positions, req_indices = oracle.rows(spans)
    assert rows.query_start_loc.tolist() == query_start_loc
    assert rows.positions.tolist() == positions
    assert rows.row_req_indices.tolist() == req_indices
    assert rows.req_indices.tolist() == [req_idx for req_idx, _, _ in spans]
    assert rows.query_lens.tolist() == [end - start for _, start, end in spans]
    assert rows.seq_lens.tolist() == [end for _, _, end in spans]
    assert rows.last_rows.tolist() == [loc - 1 for loc in query_start_loc[1:]]
    assert (rows.num_reqs, rows.num_rows) == (len(spans), len(positions))


def test_dtypes_are_those_attention_takes() -> None:
    rows = rows_of([(1, 0, 2), (0, 5, 6)])
    assert rows.req_indices.dtype == np.int64
    assert rows.query_start_loc.dtype == np.int32
    assert rows.positions.dtype == np.int64
    assert rows.seq_lens.dtype == np.int32
    block_table = np.zeros((2, 2), dtype=np.int32)
    assert rows.slot_mapping(block_table, 4).dtype == np.int64


@property_test
@given(spans(), st.randoms(use_true_random=False))
def test_slot_mapping_equals_loop(
    spans: list[tuple[int, int, int]], random: Random
) -> None:
    num_blocks = -(-MAX_POSITION // BLOCK_SIZE)
    block_table = [
        [random.randint(0, 1000) for _ in range(num_blocks)]
        for _ in range(MAX_NUM_REQS)
    ]
    slots = rows_of(spans).slot_mapping(np.array(block_table, np.int32), BLOCK_SIZE)
    assert slots.tolist() == [
        oracle.slot(block_table[req_idx], position, BLOCK_SIZE)
        for req_idx, start, end in spans
        for position in range(start, end)
    ]


def test_slots_do_not_overflow_int32_block_ids() -> None:
    block_id = 2**31 - 1
    slots = rows_of([(0, 0, 1)]).slot_mapping(np.array([[block_id]], np.int32), 16)
    assert slots.tolist() == [block_id * 16]


def test_forward_of_no_request_has_no_rows() -> None:
    rows = rows_of([])
    assert (rows.num_reqs, rows.num_rows) == (0, 0)
    assert rows.query_start_loc.tolist() == [0]
    assert rows.seq_lens.tolist() == rows.last_rows.tolist() == []
