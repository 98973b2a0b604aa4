"""Repair of the vLLM CPU kernel without which sampled speculation is not exact.

In place in every emssd worker on a CPU; for stock speculation on request, by
`EMSSD_CPU_FIXES=1`.
"""

from __future__ import annotations

import torch

from vllm_emssd.integration.hooks.hook import Hook


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Repeat each request's value once a draft token.

    Shapes: `x` [num_reqs] of any dtype, `cu_num_tokens` [num_reqs] cumulative draft
    counts; returns [num_tokens] of `x`'s dtype, `replace_from` made `replace_to`.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


EXPAND_HOOK = Hook(
    target="vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
    why=(
        "stock's CPU kernel writes into a temporary int64 copy, so temperature, "
        "top_k and top_p of drafted rows are uninitialised memory"
    ),
    signature="x, cu_num_tokens, num_tokens, replace_from, replace_to",
    remove_when="_expand_kernel_impl fills a float32 output on the CPU",
    make=lambda stock: expand_batch_to_tokens,
    when="in an emssd worker on a CPU; for stock with EMSSD_CPU_FIXES=1",
    patch="0001-cpu-expand-kernel",
)
