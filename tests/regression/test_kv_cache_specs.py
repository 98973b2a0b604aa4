"""K/V blocks of target and draft model, as vLLM groups layers of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    RSWASpec,
    SlidingWindowSpec,
)

from tests.engine import TARGET
from vllm_emssd.integration.kv_cache import (
    draft_group,
    keep_windows_whole,
    refuse_states,
)

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups
except ImportError:  # until 0.32 is no longer supported
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

HEADS: dict[str, Any] = {"block_size": 32, "head_size": 64, "dtype": torch.float32}


def full(num_kv_heads: int = 2) -> FullAttentionSpec:
    return FullAttentionSpec(num_kv_heads=num_kv_heads, **HEADS)


def sliding(window: int, num_kv_heads: int = 2) -> SlidingWindowSpec:
    return SlidingWindowSpec(sliding_window=window, num_kv_heads=num_kv_heads, **HEADS)


def chunked() -> ChunkedLocalAttentionSpec:
    return ChunkedLocalAttentionSpec(attention_chunk_size=64, num_kv_heads=2, **HEADS)


def rswa() -> RSWASpec:
    return RSWASpec(rswa_window=64, num_kv_heads=2, **HEADS)


def mamba(kind: str = "MAMBA2") -> MambaSpec:
    return MambaSpec(
        block_size=32,
        shapes=((2, 2),),
        dtypes=(torch.float32,),
        mamba_type=MambaAttentionBackendEnum[kind],
    )


def layers(
    target: list[KVCacheSpec], draft: list[KVCacheSpec]
) -> dict[str, KVCacheSpec]:
    specs = {f"target.{i}": spec for i, spec in enumerate(target)}
    return specs | {f"draft.{i}": spec for i, spec in enumerate(draft)}


def test_full_attention_stays_as_it_is() -> None:
    specs = layers([full(4)] * 2, [full()])
    assert keep_windows_whole(specs) == specs


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ([sliding(64)], [sliding(64)]),
        ([sliding(64)], [sliding(96)]),
        ([full(), sliding(64)], [full()]),
        ([full(), sliding(64)], [full(), sliding(96)]),
        ([full(4), sliding(64, 4)], [full(), sliding(96)]),
        ([full(), chunked()], [full(), chunked()]),
        # Layers of full attention would be spread over groups as small as the window's.
        ([full()] * 4 + [sliding(64)], [full()] * 3),
    ],
)
def test_layers_of_a_drafter_share_blocks_whatever_the_windows(
    target: list[KVCacheSpec], draft: list[KVCacheSpec]
) -> None:
    specs = layers(target, draft)
    whole = keep_windows_whole(specs)
    assert whole.keys() == specs.keys()
    for name, spec in specs.items():
        assert isinstance(whole[name], FullAttentionSpec)
        assert whole[name].page_size_bytes == spec.page_size_bytes
    vllm_config = EngineArgs(TARGET, max_model_len=512).create_engine_config()
    groups = get_kv_cache_groups(vllm_config, whole)
    theirs = {name for name in specs if name.startswith("draft")}
    assert draft_group(KVCacheConfig(8, [], groups), theirs) == 0


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ([({"draft.0", "target.0"}, rswa())], "1 groups, of RSWASpec"),
        ([({"draft.0"}, full()), ({"draft.1"}, full())], "2 groups"),
        ([({"draft.0"}, full()), ({"draft.1"}, mamba())], "2 groups, of MambaSpec"),
        ([({"target.0"}, full())], "0 groups"),
    ],
)
def test_other_drafters_are_refused(
    groups: list[tuple[set[str], KVCacheSpec]], found: str
) -> None:
    specs = [KVCacheGroupSpec(sorted(names), spec) for names, spec in groups]
    with pytest.raises(ValueError, match=rf"found them in {found}\. Choose another"):
        draft_group(KVCacheConfig(8, [], specs), {"draft.0", "draft.1"})


@pytest.mark.parametrize("kind", ["MAMBA1", "LINEAR"])
def test_states_that_vllm_does_not_take_back_are_refused(kind: str) -> None:
    specs = {"layers.0": full(), "layers.1": mamba(kind)}
    with pytest.raises(ValueError, match=r"layers\.1.* Remove --speculative-config"):
        refuse_states(specs)


@pytest.mark.parametrize("kind", ["MAMBA2", "GDN_ATTN", "SHORT_CONV"])
def test_states_that_vllm_takes_back_are_taken(kind: str) -> None:
    refuse_states({"layers.0": full(), "layers.1": mamba(kind)})
