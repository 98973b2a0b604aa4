"""Whole forwards of ragged batches as CUDA graphs."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend
from vllm.v1.worker.utils import AttentionGroup


def takes_ragged_graphs(
    attn_groups: list[list[AttentionGroup]], vllm_config: VllmConfig, most_rows: int
) -> bool:
    """Whether attention can be replayed with any 1 to `most_rows` rows a request."""
    unsupported = get_varlen_cudagraph_unsupported_backend(
        attn_groups, vllm_config, most_rows
    )
    return unsupported is None
