"""How many row counts a CPU's linear layers keep kernels for."""

from __future__ import annotations

import pytest
from vllm import _custom_ops
from vllm.model_executor.layers import utils

from tests.without_hooks import without
from vllm_emssd.integration import compat, hooks
from vllm_emssd.integration.cpu_kernels import (
    KERNELS_HOOK,
    MOST_ROW_COUNTS,
    keep_more_kernels,
)


@pytest.mark.parametrize(
    ("asked", "kept"), [((32,), MOST_ROW_COUNTS), ((), MOST_ROW_COUNTS), ((999,), 999)]
)
def test_layers_keep_as_many_as_ragged_batches_have(
    asked: tuple[int, ...], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(weight: object, primitive_cache_size: int = 128) -> int:
        return primitive_cache_size

    with without([KERNELS_HOOK]):
        monkeypatch.setattr(_custom_ops, "create_onednn_mm", create)
        with hooks.installed([KERNELS_HOOK]):
            assert _custom_ops.create_onednn_mm(None, *asked) == kept  # type: ignore
        assert _custom_ops.create_onednn_mm is create


def test_a_vllm_that_names_the_number_needs_no_hook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert hooks.is_needed(KERNELS_HOOK)
    keep_more_kernels()  # nothing to raise
    assert not hasattr(utils, compat.PRIMITIVE_CACHE_SIZE)
    monkeypatch.setattr(utils, compat.PRIMITIVE_CACHE_SIZE, 32, raising=False)
    assert not hooks.is_needed(KERNELS_HOOK)
    keep_more_kernels()
    assert getattr(utils, compat.PRIMITIVE_CACHE_SIZE) == MOST_ROW_COUNTS
