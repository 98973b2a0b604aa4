"""Which steps the target replays from CUDA graphs, where the user does not say."""

from __future__ import annotations

from vllm.engine.arg_utils import EngineArgs

_MOST_ROWS = 2048  # beyond, the device takes longer than the host takes to launch
_DENSE_ROWS = 512  # vLLM's own sizes go up to here
_REQUEST_STEP = 8


def capture_sizes(rows_a_request: int, max_num_seqs: int | None) -> list[int]:
    """Row counts, rising: vLLM's own, and beyond them decoding steps of every eighth
    number of requests, up to all requests. `rows_a_request`: K + 1."""
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, _DENSE_ROWS + 1, 16)}
    most = _MOST_ROWS
    if max_num_seqs is not None:
        most = min(most, max_num_seqs * rows_a_request)
    sizes.update(range(0, most + 1, _REQUEST_STEP * rows_a_request))
    sizes.add(most - most % rows_a_request)
    return sorted(n for n in sizes if 0 < n <= most)


def widen_capture_sizes(args: EngineArgs, rows_a_request: int) -> None:
    """vLLM stops at 512 rows: with K = 5 those of 85 requests. No size of the user's
    is changed."""
    config = args.compilation_config
    if (
        args.cudagraph_capture_sizes is None
        and args.max_cudagraph_capture_size is None
        and config.cudagraph_capture_sizes is None
        and config.max_cudagraph_capture_size is None
    ):
        args.cudagraph_capture_sizes = capture_sizes(rows_a_request, args.max_num_seqs)
