"""K/V blocks of target and draft model, as vLLM groups layers of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    RSWASpec,
    SlidingWindowSpec,
)

from tests.engine import TARGET
from vllm_emssd.integration.kv_cache import refuse_states, specs_for_drafting

HEADS: dict[str, Any] = {"block_size": 32, "head_size": 64, "dtype": torch.float32}


def full(num_kv_heads: int = 2) -> FullAttentionSpec:
    return FullAttentionSpec(num_kv_heads=num_kv_heads, **HEADS)


def sliding(window: int, num_kv_heads: int = 2) -> SlidingWindowSpec:
    return SlidingWindowSpec(sliding_window=window, num_kv_heads=num_kv_heads, **HEADS)


def chunked() -> ChunkedLocalAttentionSpec:
    return ChunkedLocalAttentionSpec(attention_chunk_size=64, num_kv_heads=2, **HEADS)


def vllm_config(**options: Any) -> Any:
    return EngineArgs(TARGET, max_model_len=512, **options).create_engine_config()


def settled(
    target: list[KVCacheSpec], draft: list[KVCacheSpec], **options: Any
) -> tuple[dict[str, KVCacheSpec], dict[str, KVCacheSpec]]:
    """Specs of target and drafter by layer, as given and as made for drafting; the
    drafter's layers are in one group of full attention then."""
    config = vllm_config(**options)
    specs = {f"target.{i}": spec for i, spec in enumerate(target)}
    specs |= {f"draft.{i}": spec for i, spec in enumerate(draft)}
    theirs = {name for name in specs if name.startswith("draft")}
    made = specs_for_drafting(config, specs, theirs)
    groups = get_kv_cache_groups(config, dict(made))
    (group,) = (g for g in groups if theirs & set(g.layer_names))
    assert theirs <= set(group.layer_names)
    assert all(isinstance(made[name], FullAttentionSpec) for name in theirs)
    return specs, made


@pytest.mark.parametrize("manager_is_off", [False, True])
@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ([full()] * 2, [full()]),
        ([full(4)] * 2, [full()]),
        ([full(), sliding(64)], [full()]),  # layers of both kinds in equal parts
    ],
)
def test_blocks_are_as_stock_where_the_drafter_is_in_one_group(
    target: list[KVCacheSpec], draft: list[KVCacheSpec], manager_is_off: bool
) -> None:
    specs, made = settled(target, draft, disable_hybrid_kv_cache_manager=manager_is_off)
    assert made == specs


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ([sliding(64)], [sliding(64)]),
        ([sliding(64)], [sliding(96)]),
        ([full(), sliding(64)], [full(), sliding(96)]),
        ([full(4), sliding(64, 4)], [full(), sliding(96)]),
        ([full(), chunked()], [full(), chunked()]),
        # Layers of full attention are spread over groups as small as the windows'.
        ([full()] * 4 + [sliding(64)], [full()] * 3),
    ],
)
def test_blocks_are_kept_for_all_positions_where_windows_part_the_drafter(
    target: list[KVCacheSpec], draft: list[KVCacheSpec]
) -> None:
    specs, made = settled(target, draft)
    assert made != specs
    assert made.keys() == specs.keys()
    assert all(isinstance(spec, FullAttentionSpec) for spec in made.values())
    for name, spec in specs.items():
        assert made[name].page_size_bytes == spec.page_size_bytes


def mamba(kind: MambaAttentionBackendEnum) -> MambaSpec:
    return MambaSpec(
        block_size=32, shapes=((2, 2),), dtypes=(torch.float32,), mamba_type=kind
    )


@pytest.mark.parametrize(
    "draft",
    [
        [RSWASpec(rswa_window=64, num_kv_heads=2, **HEADS)],
        [full(), mamba(MambaAttentionBackendEnum.MAMBA2)],
        [],
    ],
)
def test_other_drafters_are_refused(draft: list[KVCacheSpec]) -> None:
    with pytest.raises(ValueError, match=r"one group of .*, found .* 'model', or rem"):
        settled([full()], draft)


@pytest.mark.parametrize("kind", ["MAMBA1", "LINEAR"])
def test_states_that_vllm_does_not_take_back_are_refused(kind: str) -> None:
    specs = {"layers.0": full(), "layers.1": mamba(MambaAttentionBackendEnum[kind])}
    with pytest.raises(ValueError, match=r"layers\.1.* Remove --speculative-config"):
        refuse_states(specs)


@pytest.mark.parametrize("kind", ["MAMBA2", "GDN_ATTN", "SHORT_CONV"])
def test_states_that_vllm_takes_back_are_taken(kind: str) -> None:
    refuse_states(
        {"layers.0": full(), "layers.1": mamba(MambaAttentionBackendEnum[kind])}
    )
