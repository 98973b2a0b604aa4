"""Our workers: what they share, and the one for GPUs.

The CPU's is apart (`cpu/worker.py`): vLLM's module for it makes no-ops of torch's CUDA
streams, events and copies as soon as it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

# What torch's CPU allocator says; it raises a plain RuntimeError.
_CPU_WORDS = ("can't allocate memory", "not enough memory")


class EmssdWorkerMixin(Worker):
    """Counters and costs over RPC, automatic lengths once the models are warm, and what
    to lower where a start runs out of memory."""

    model_runner: Any  # one of ours

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with memory_advice("loading the models"):
            super().load_model(*args, **kwargs)

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        with memory_advice("allocating the KV cache of target and draft model"):
            super().initialize_from_config(*args, **kwargs)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        with memory_advice("warming up"):
            times = super().compile_or_warm_up_model()
        self.model_runner.start_automatic_lengths()
        return times

    def emssd_stats(self) -> dict[str, int]:
        """This rank's counters since start: `llm.collective_rpc("emssd_stats")`."""
        return self.model_runner.counters.as_dict()

    def emssd_costs(self) -> dict[str, Any]:
        """The costs that this rank's automatic lengths go by now: (rows, ms) of
        `target` and `draft`, and `fixed_ms`; empty with fixed lengths."""
        meter = self.model_runner.step_costs
        return {} if meter is None else meter.as_dict()

    def emssd_fix_draft_length(self, num_draft_tokens: int | None) -> None:
        """From now on every request drafts so many tokens a step; 0 turns speculation
        off, None makes lengths automatic again. On all ranks, between two steps:
        `llm.collective_rpc("emssd_fix_draft_length", args=(3,))`.

        Nothing is copied meanwhile. Raises ValueError unless lengths are automatic,
        with a draft model, and for more than `num_speculative_tokens`.
        """
        self.model_runner.fix_draft_length(num_draft_tokens)

    def emssd_use_proposer(self, proposer: str | None) -> None:
        """From now on only "draft_model" or "llma" of the mixed proposer makes drafts;
        None: both again. Lengths that `emssd_fix_draft_length` fixed are automatic
        again. On all ranks, between two steps:
        `llm.collective_rpc("emssd_use_proposer", args=("llma",))`.

        Raises ValueError with another proposer than "mixed", and for other names.
        """
        self.model_runner.use_proposer(proposer)


def runner_class(use_v2: bool) -> Any:
    """Our model runner on this platform, for vLLM's choice of one: see `runners.py`."""
    is_cpu = current_platform.is_cpu()
    if use_v2:
        from vllm_emssd.integration.v2 import runner as v2

        return v2.UnpadCPUModelRunnerV2 if is_cpu else v2.UnpadGPUModelRunnerV2
    from vllm_emssd.integration.v1 import runner as v1

    return v1.UnpadCPUModelRunner if is_cpu else v1.UnpadGPUModelRunner


class UnpadGPUWorker(EmssdWorkerMixin):
    def _make_model_runner(self) -> Any:
        runner = runner_class(self.use_v2_model_runner)
        return runner(self.vllm_config, self.device)


@contextmanager
def memory_advice(doing: str) -> Iterator[None]:
    """Turn running out of memory in the block into a RuntimeError that says what to
    lower. All other errors pass through."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
        is_known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_known and not any(words in str(error) for words in _CPU_WORDS):
            raise
        raise RuntimeError(
            f'"method": "emssd" ran out of memory while {doing}. Lower '
            "--kv-cache-memory-bytes (on a GPU --gpu-memory-utilization, on a CPU "
            "VLLM_CPU_KVCACHE_SPACE), --max-num-seqs or --max-model-len, or choose a "
            f"smaller draft 'model'. {error}"
        ) from error
