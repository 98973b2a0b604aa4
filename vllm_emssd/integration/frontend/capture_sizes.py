"""Row counts that CUDA graphs are recorded for, unless the user chose some."""

from __future__ import annotations

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

_MAX_ROWS = 2048  # beyond, the device takes longer than the host takes to launch
_DEFAULT_REQUESTS = 1024  # the most that vLLM sets where the user does not, later


def capture_sizes(rows_a_request: int, max_num_seqs: int) -> list[int]:
    """Row counts, rising: vLLM's own, decoding steps of every eighth number of requests
    up to all, and draft forwards of all requests. `rows_a_request`: K + 1."""
    dense = 1024 if current_platform.is_device_capability_family(100) else 512
    dense = min(2 * max_num_seqs * rows_a_request, dense)  # as vLLM has it
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, dense + 1, 16)}
    sizes = {n for n in sizes if n <= dense}
    most = min(max_num_seqs, _MAX_ROWS // rows_a_request)
    requests = [n for n in (1, 2, 4, *range(8, most, 8), most) if n <= most]
    sizes |= {n * rows_a_request for n in requests}
    # A draft model's graphs take one row a request, and two in a step's first forward.
    sizes |= {n for n in (max_num_seqs, 2 * max_num_seqs) if n <= _MAX_ROWS}
    return sorted(sizes)


def widen_capture_sizes(args: EngineArgs, rows_a_request: int) -> None:
    """vLLM stops at 512 rows: with K = 5 those of 85 requests. No size of the user's
    is changed."""
    config = args.compilation_config
    if (
        args.performance_mode == "balanced"
        and args.cudagraph_capture_sizes is None
        and args.max_cudagraph_capture_size is None
        and config.cudagraph_capture_sizes is None
        and config.max_cudagraph_capture_size is None
    ):
        num_reqs = args.max_num_seqs or _DEFAULT_REQUESTS
        args.cudagraph_capture_sizes = capture_sizes(rows_a_request, num_reqs)
