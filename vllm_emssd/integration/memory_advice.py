"""What to lower when a start runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What torch's CPU allocator says; it raises a plain RuntimeError.
_CPU_WORDS = ("can't allocate memory", "not enough memory")


@contextmanager
def memory_advice(doing: str) -> Iterator[None]:
    """Turn running out of memory in the block into an error that says what to lower.

    Raises: RuntimeError. All other errors pass through.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
        if not is_out_of_memory(error):
            raise
        raise RuntimeError(
            f'"method": "emssd" ran out of memory while {doing}. Lower '
            "--kv-cache-memory-bytes (on a GPU --gpu-memory-utilization, on a CPU "
            "VLLM_CPU_KVCACHE_SPACE), --max-num-seqs or --max-model-len, or choose a "
            f"smaller draft 'model'. {error}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in _CPU_WORDS)
