"""What all our worker classes share, whatever the device."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_emssd.integration.memory_advice import memory_advice
from vllm_emssd.metrics import Counters


class EmssdWorkerMixin(Worker):
    """Counters and costs over RPC, lengths by measured costs once the models are warm,
    and what to lower where a start runs out of memory."""

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
        counters: Counters = self.model_runner.counters
        return counters.as_dict()

    def emssd_costs(self) -> dict[str, Any]:
        """What this rank's automatic lengths are decided by, as it is now: (rows, ms)
        of `target` and `draft`, and `fixed_ms`; empty with fixed lengths."""
        costs: dict[str, Any] = self.model_runner.costs_now()
        return costs

    def emssd_fix_draft_length(self, num_draft_tokens: int | None) -> None:
        """From now on every request drafts so many tokens a step; 0 turns speculation
        off, None makes lengths automatic again. On all ranks, between two steps:
        `llm.collective_rpc("emssd_fix_draft_length", args=(3,))`.

        Raises ValueError unless lengths are automatic, on the V1 runner with a draft
        model alone, and for more than `num_speculative_tokens`.
        """
        if not hasattr(self.model_runner, "fix_draft_length"):
            raise ValueError("draft lengths can be fixed on the V1 runner only")
        self.model_runner.fix_draft_length(num_draft_tokens)

    def emssd_use_proposer(self, proposer: str | None) -> None:
        """From now on only "draft_model" or "llma" of the mixed proposer makes drafts;
        None: both again. On all ranks, between two steps:
        `llm.collective_rpc("emssd_use_proposer", args=("llma",))`.

        Raises ValueError with another proposer than "mixed", and for other names.
        """
        if not hasattr(self.model_runner, "use_proposer"):
            raise ValueError("only the V1 runner has a mixed proposer")
        self.model_runner.use_proposer(proposer)
