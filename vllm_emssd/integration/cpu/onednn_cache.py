"""How many row counts a CPU keeps kernels for.

oneDNN makes its kernels for one row count each, and vLLM's linear layers keep those of
the 32 row counts used last. Padded batches have few; ragged batches have more, prompts
aside as many as `row_padding.ROW_COUNTS`, and making kernels anew takes a fifth of a
forward. So in emssd workers the layers keep more of them. That takes memory, though
only for row counts that come up: 0.5 GiB for 200 of them, measured on 16 layers of
hidden size 1024.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from vllm_emssd.integration.hooks.hook import Hook

MAX_ROW_COUNTS = 256


def _make(stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def create(weight: torch.Tensor, primitive_cache_size: int = 0) -> Any:
        return stock(weight, max(primitive_cache_size, MAX_ROW_COUNTS))

    return create


KERNELS_HOOK = Hook(
    target="vllm._custom_ops:create_onednn_mm",
    why="linear layers keep the kernels of 32 row counts; ragged batches have more",
    signature="weight, primitive_cache_size",
    remove_when="linear layers keep the kernels of all row counts they meet",
    make=_make,
    when="while an emssd worker on a CPU loads its models",
    patch="0011-onednn-primitive-cache-size",
)
