"""How many row counts a CPU's linear layers keep kernels for."""

from __future__ import annotations

import pytest
from vllm import _custom_ops

from tests.without_hooks import without
from vllm_emssd.integration.cpu.onednn_cache import KERNELS_HOOK, MAX_ROW_COUNTS
from vllm_emssd.integration.hooks.hook import installed


@pytest.mark.parametrize(
    ("asked", "kept"), [((32,), MAX_ROW_COUNTS), ((), MAX_ROW_COUNTS), ((999,), 999)]
)
def test_layers_keep_as_many_as_ragged_batches_have(
    asked: tuple[int, ...], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(weight: object, primitive_cache_size: int = 128) -> int:
        return primitive_cache_size

    with without([KERNELS_HOOK]):
        monkeypatch.setattr(_custom_ops, "create_onednn_mm", create)
        with installed([KERNELS_HOOK]):
            assert _custom_ops.create_onednn_mm(None, *asked) == kept  # type: ignore
        assert _custom_ops.create_onednn_mm is create
