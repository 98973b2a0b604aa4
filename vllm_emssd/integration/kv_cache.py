"""What the draft cursor asks of the draft model's KV cache."""

from __future__ import annotations

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    UniformTypeKVCacheSpecs,
)


def check_full_attention(kv_cache_config: KVCacheConfig, gid: int) -> None:
    """Raise ValueError where the drafter's K/V does not stay in its blocks."""
    spec = kv_cache_config.kv_cache_groups[gid].kv_cache_spec
    is_uniform = isinstance(spec, UniformTypeKVCacheSpecs)
    for one in spec.kv_cache_specs.values() if is_uniform else [spec]:
        if not isinstance(one, FullAttentionSpec):
            raise ValueError(
                '"method": "emssd" needs a draft model with full attention in every '
                f"layer, found {type(one).__name__}. Choose another 'model', or use "
                '"method": "draft_model".'
            )
