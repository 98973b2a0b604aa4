"""Row counts that CUDA graphs are recorded for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs

from tests.engine import TARGET
from vllm_emssd.integration.frontend.capture_sizes import (
    capture_sizes,
    widen_capture_sizes,
)


@given(rows=st.integers(2, 17), max_num_seqs=st.integers(1, 600))
def test_full_batches_have_graphs(rows: int, max_num_seqs: int) -> None:
    """Of the target, and of draft forwards with one row a request, or two."""
    sizes = capture_sizes(rows, max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert len(sizes) < 200
    for query_len in (1, 2, rows):
        num_reqs = min(max_num_seqs, 2048 // query_len)
        assert num_reqs * query_len in sizes


@pytest.mark.parametrize(("max_num_seqs", "largest"), [(8, 96), (32, 384), (85, 512)])
def test_no_size_of_vllms_is_lost(max_num_seqs: int, largest: int) -> None:
    """With few requests prompts are in most of the larger steps."""
    wanted = {1, 2, 4, *range(8, min(largest, 255) + 1, 8)}
    wanted |= {*range(256, largest + 1, 16)}
    assert wanted <= set(capture_sizes(6, max_num_seqs))


@pytest.mark.parametrize(
    "asked",
    [
        {"cudagraph_capture_sizes": [8]},
        {"max_cudagraph_capture_size": 8},
        {"compilation_config": {"cudagraph_capture_sizes": [8]}},
        {"compilation_config": {"max_cudagraph_capture_size": 8}},
        {"performance_mode": "interactivity"},
    ],
)
def test_what_the_user_asked_for_stays(asked: dict[str, Any]) -> None:
    args = EngineArgs(model=TARGET, max_num_seqs=128, **asked)
    before = args.cudagraph_capture_sizes
    widen_capture_sizes(args, 6)
    assert args.cudagraph_capture_sizes == before


@pytest.mark.parametrize(("max_num_seqs", "largest"), [(128, 768), (None, 2048)])
def test_sizes_are_given_where_the_user_gave_none(
    max_num_seqs: int | None, largest: int
) -> None:
    args = EngineArgs(model=TARGET, max_num_seqs=max_num_seqs)
    widen_capture_sizes(args, 6)
    assert args.cudagraph_capture_sizes is not None
    assert max(args.cudagraph_capture_sizes) == largest
