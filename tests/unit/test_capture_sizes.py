"""Row counts that the target's CUDA graphs are recorded for."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.engine import TARGET
from vllm_emssd.integration.frontend.capture_sizes import (
    capture_sizes,
    widen_capture_sizes,
)


@pytest.mark.parametrize(
    ("rows", "max_num_seqs", "largest"),
    [
        (6, 1, 6),
        (6, 128, 768),
        (6, 85, 510),
        (6, 1024, 2046),
        (9, None, 2043),
        (17, 32, 544),
    ],
)
def test_all_requests_are_covered_up_to_a_number_of_rows(
    rows: int, max_num_seqs: int | None, largest: int
) -> None:
    sizes = capture_sizes(rows, max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert all(n % rows == 0 for n in sizes if n > 512)
    assert len(sizes) < 120


@pytest.mark.parametrize(
    "asked",
    [
        {"cudagraph_capture_sizes": [8]},
        {"max_cudagraph_capture_size": 8},
        {"compilation_config": {"cudagraph_capture_sizes": [8]}},
        {"compilation_config": {"max_cudagraph_capture_size": 8}},
    ],
)
def test_the_users_sizes_stay(asked: dict[str, Any]) -> None:
    args = EngineArgs(model=TARGET, max_num_seqs=128, **asked)
    before = args.cudagraph_capture_sizes
    widen_capture_sizes(args, 6)
    assert args.cudagraph_capture_sizes == before


def test_sizes_are_given_where_the_user_gave_none() -> None:
    args = EngineArgs(model=TARGET, max_num_seqs=128)
    widen_capture_sizes(args, 6)
    assert args.cudagraph_capture_sizes is not None
    assert max(args.cudagraph_capture_sizes) == 768
