"""Compiles the kernels for a GPU, which takes none.

The interpreter takes what the compiler refuses: variables that change their type in a
loop, a branch that leaves one undefined.
"""

from __future__ import annotations

from typing import Any

H100 = "cuda", 90, 32
INTS64 = ("idx_mapping", "positions", "out_idx_mapping", "draft_step", "out_num_reqs")
INTS64 += ("tokens", "last_positions", "draft_tokens", "num_real", "drafts", "rows")
TYPES = dict.fromkeys(INTS64, "*i64") | {
    "reference_addresses": "*i64",
    "records": "*fp64",
    "out_found": "*fp64",
    "logits": "*fp32",
    "text_address": "i64",
}
NUMBERS = ("num_reqs", "num_rows_padded", "max_num_reqs", "last_position")
NUMBERS += ("text_stride", "token_ids_stride", "draft_tokens_stride", "drafts_stride")
NUMBERS += ("logits_stride", "logits_stride_of_step", "max_model_len", "vocab_size")
TYPES |= dict.fromkeys(NUMBERS, "i32")  # all others are arrays of int32


def size_of(kernel: Any, **constants: int) -> int:
    """Bytes of the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: TYPES.get(name, "*i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): n for name, n in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return len(triton.compile(source, target=GPUTarget(*H100)).asm["cubin"])


def run_all() -> dict[str, int]:
    import triton.backends

    from vllm_emssd.integration.v2.copy_kernels import (
        find_copies_kernel,
        observe_copies_kernel,
    )
    from vllm_emssd.integration.v2.kernels import (
        advance_kernel,
        one_hot_draft_logits_kernel,
        place_rows_kernel,
    )

    del triton.backends.backends["cpu"]  # the one that was pretended
    block = {"BLOCK_SIZE": 512}
    copies = {"K": 7, "K_PADDED": 8, "CHECK_LENGTH": 2}
    return {
        "place_rows": size_of(place_rows_kernel, ROWS=2, **block),
        "place_spans": size_of(place_rows_kernel, ROWS=0, **block),
        "advance": size_of(advance_kernel, **block),
        "set_one_hot_draft_logits": size_of(one_hot_draft_logits_kernel, **block),
        "observe_copies": size_of(observe_copies_kernel, **block),
        "find_copies": size_of(find_copies_kernel, **copies, **block),
    }
