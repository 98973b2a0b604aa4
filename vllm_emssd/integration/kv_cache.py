"""What drafting asks of the KV cache.

The draft cursor goes by one table of blocks that keep their content, and verification
drops rejected rows by overwriting them. So a draft model's layers must share one group
of blocks that are kept for all positions, and a target with recurrent state must be one
whose state vLLM takes back to the last accepted token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    RSWASpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    iter_layer_specs,
    replace_as,
)

logger = init_logger("vllm.emssd.kv_cache")

# Whose metadata both of vLLM's runners give the number of accepted tokens.
_ROLLED_BACK = {
    MambaAttentionBackendEnum.MAMBA2,
    MambaAttentionBackendEnum.GDN_ATTN,
    MambaAttentionBackendEnum.SHORT_CONV,
}
_CHOOSE_ANOTHER = (
    "Choose another 'model', or remove it from --speculative-config to copy from the "
    "text (llma)."
)


def refuse_states(specs: Mapping[str, KVCacheSpec]) -> None:
    """Raise ValueError where a layer has state that vLLM does not take back."""
    for name, spec in specs.items():
        if isinstance(spec, MambaSpec) and spec.mamba_type not in _ROLLED_BACK:
            raise ValueError(
                f'"method": "emssd" does not support {spec.mamba_type.name} layers '
                f"({name}): vLLM does not take their state back to the last accepted "
                "token, so answers would be wrong. Remove --speculative-config."
            )


def specs_for_drafting(
    vllm_config: VllmConfig,
    specs: dict[str, KVCacheSpec],
    draft_layers: Collection[str],
) -> dict[str, KVCacheSpec]:
    """Specs with which the draft model's layers share one group of kept blocks.

    Where sliding windows prevent it, blocks of all layers, the target's too, are kept
    for all positions, as with vLLM's --disable-hybrid-kv-cache-manager; attention looks
    at the same window as before. Raises ValueError where that is not enough.
    """
    if _are_kept_together(vllm_config, specs, draft_layers):
        return specs
    whole = {name: _kept_whole(spec) for name, spec in specs.items()}
    if whole == specs or not _are_kept_together(vllm_config, whole, draft_layers):
        kinds = {type(specs[name]).__name__ for name in draft_layers if name in specs}
        raise ValueError(
            '"method": "emssd" needs a draft model whose layers share one group of '
            "KV-cache blocks that are kept for all positions, found "
            f"{', '.join(sorted(kinds)) or 'no attention'}. {_CHOOSE_ANOTHER}"
        )
    logger.warning(
        "The KV cache of sliding-window layers is kept for all positions, since a "
        "draft model's layers must share one group of blocks. Fewer requests fit."
    )
    return whole


def _are_kept_together(
    vllm_config: VllmConfig,
    specs: dict[str, KVCacheSpec],
    draft_layers: Collection[str],
) -> bool:
    try:
        groups = get_kv_cache_groups(vllm_config, dict(specs))
    except (ValueError, NotImplementedError):
        return False  # groups that vLLM cannot make
    theirs = [g for g in groups if not set(draft_layers).isdisjoint(g.layer_names)]
    return len(theirs) == 1 and not _recycled(theirs[0].kv_cache_spec)


def _recycled(spec: KVCacheSpec) -> set[str]:
    """Kinds of layers in a group whose blocks are not kept for all positions."""
    return {
        type(one).__name__
        for one in iter_layer_specs(spec)
        if not isinstance(one, FullAttentionSpec) or isinstance(one, RSWASpec)
    }


def _kept_whole(spec: KVCacheSpec) -> KVCacheSpec:
    if isinstance(spec, SlidingWindowMLASpec):
        return spec
    if isinstance(spec, SlidingWindowSpec):
        return replace_as(
            spec,
            FullAttentionSpec,
            drop=("extra_retained_tokens",),
            sliding_window=None,
        )
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return replace_as(spec, FullAttentionSpec, attention_chunk_size=None)
    return spec


def check_full_attention(kv_cache_config: KVCacheConfig, gid: int) -> None:
    """Raise ValueError where the drafter's K/V does not stay in its blocks."""
    if kinds := _recycled(kv_cache_config.kv_cache_groups[gid].kv_cache_spec):
        raise ValueError(
            '"method": "emssd" needs a draft model whose K/V is kept for all '
            f"positions, found {', '.join(sorted(kinds))}. {_CHOOSE_ANOTHER}"
        )


def remake_metadata_builders(
    drafter: Any, vllm_config: VllmConfig, device: torch.device
) -> None:
    """Make the builders of a V1 draft model's attention metadata anew: vLLM makes each
    when it has seen one layer, whose window is then taken for that of all."""
    for group in drafter.draft_attn_groups:
        (builder,) = group.metadata_builders
        block_size = builder.kv_cache_spec.block_size
        group.metadata_builders.clear()
        group.create_metadata_builders(
            vllm_config, device, kernel_block_size=block_size
        )
