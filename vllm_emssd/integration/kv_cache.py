"""What drafting asks of the KV cache.

The draft cursor goes by one table of blocks that keep their content, and verification
drops rejected rows by overwriting them. So a draft model's layers must share one group
of blocks that are kept for all positions, and a target with recurrent state must be one
whose state vLLM takes back to the last accepted token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
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


def refuse_states(specs: Mapping[str, KVCacheSpec]) -> None:
    """Raise ValueError where a layer has state that vLLM does not take back."""
    for name, spec in specs.items():
        if isinstance(spec, MambaSpec) and spec.mamba_type not in _ROLLED_BACK:
            raise ValueError(
                f'"method": "emssd" does not support {spec.mamba_type.name} layers '
                f"({name}): vLLM does not take their state back to the last accepted "
                "token, so answers would be wrong. Remove --speculative-config."
            )


def keep_windows_whole(specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Specs of target and draft model with which the latter's layers can share a group.

    Where any layer has a sliding window, blocks of all are kept for all positions, as
    with vLLM's --disable-hybrid-kv-cache-manager; attention sees the same window as
    before.
    """
    whole = {name: _kept_whole(spec) for name, spec in specs.items()}
    if whole != specs:
        logger.warning(
            "The KV cache of sliding-window layers is kept for all positions, since a "
            "draft model's layers must share one group of blocks: fewer requests fit."
        )
    return whole


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


def draft_group(kv_cache_config: KVCacheConfig, draft_layers: Collection[str]) -> int:
    """The KV-cache group of the draft model.

    Raises ValueError where its layers are in several, or in one whose blocks are not
    kept for all positions.
    """
    groups = {
        gid: group.kv_cache_spec
        for gid, group in enumerate(kv_cache_config.kv_cache_groups)
        if not set(draft_layers).isdisjoint(group.layer_names)
    }
    kinds = {
        type(one).__name__
        for spec in groups.values()
        for one in iter_layer_specs(spec)
        if not isinstance(one, FullAttentionSpec) or isinstance(one, RSWASpec)
    }
    if len(groups) != 1 or kinds:
        raise ValueError(
            '"method": "emssd" needs a draft model whose layers share one group of '
            "KV-cache blocks that are kept for all positions, found them in "
            f"{len(groups)} groups{''.join(f', of {kind}' for kind in sorted(kinds))}. "
            "Choose another 'model', or remove it from --speculative-config to copy "
            "from the text (llma)."
        )
    return next(iter(groups))


def remake_metadata_builders(drafter: Any) -> None:
    """Make the builders of a V1 draft model's attention metadata anew: vLLM makes each
    when it has seen one layer, whose window is then taken for that of all."""
    for group in drafter.draft_attn_groups:
        (builder,) = group.metadata_builders
        block_size = builder.kv_cache_spec.block_size
        group.metadata_builders.clear()
        group.create_metadata_builders(
            drafter.vllm_config, drafter.device, kernel_block_size=block_size
        )
