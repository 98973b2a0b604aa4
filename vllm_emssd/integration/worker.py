"""Worker classes: vLLM's own, with our model runner in them."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from vllm_emssd.integration import compat, hooks
from vllm_emssd.integration.cpu_fixes import install_cpu_fixes
from vllm_emssd.integration.memory_advice import memory_advice
from vllm_emssd.integration.runner_v1 import UnpadCPUModelRunner, UnpadGPUModelRunner

CPU_RUNNER_HOOK = hooks.Hook(
    target="vllm.v1.worker.cpu_worker:CPUModelRunner",
    why="CPUWorker.init_device names its runner class; in place only while it runs",
    signature="vllm_config, device",
    upstream="a _make_model_runner method on CPUWorker, as the GPU worker has",
    remove_when="CPUWorker builds its runner in an overridable method",
    make=lambda stock: UnpadCPUModelRunner,
    when="while an emssd worker makes its device ready",
    patch="0005-overridable-cpu-model-runner",
    is_upstream=compat.cpu_worker_makes_runner_in_a_method,
)


class _EmssdStats:
    model_runner: UnpadCPUModelRunner | UnpadGPUModelRunner

    def emssd_stats(self) -> dict[str, int]:
        """This rank's counters since start: `llm.collective_rpc("emssd_stats")`."""
        return self.model_runner.counters.as_dict()

    def emssd_costs(self) -> dict[str, Any]:
        """What this rank's automatic lengths are decided by, as it is now: (rows, ms)
        of `target` and `draft`, and `fixed_ms`; empty with fixed lengths."""
        return self.model_runner.costs_now()


class _MemoryAdvice(WorkerBase):
    """Names what to lower where a start runs out of memory."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with memory_advice("loading the models"):
            super().load_model(*args, **kwargs)

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        with memory_advice("allocating the KV cache of target and draft model"):
            super().initialize_from_config(*args, **kwargs)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        with memory_advice("warming up"):
            return super().compile_or_warm_up_model()


class FixedCPUWorker(CPUWorker):
    """vLLM's CPU worker with its kernels repaired, for stock speculation."""

    def init_device(self) -> None:
        install_cpu_fixes()
        super().init_device()


class UnpadCPUWorker(_EmssdStats, _MemoryAdvice, FixedCPUWorker):
    def compile_or_warm_up_model(self) -> CompilationTimes:
        times = super().compile_or_warm_up_model()
        self.model_runner.start_automatic_lengths()
        return times

    def init_device(self) -> None:
        _require_v1_runner(self.use_v2_model_runner)
        with hooks.installed([CPU_RUNNER_HOOK]):
            super().init_device()

    def _make_model_runner(self) -> CPUModelRunner:
        """Called by a vLLM that needs no `CPU_RUNNER_HOOK`."""
        return UnpadCPUModelRunner(self.vllm_config, self.device)


class UnpadGPUWorker(_EmssdStats, _MemoryAdvice, Worker):
    def _make_model_runner(self) -> GPUModelRunner:
        _require_v1_runner(self.use_v2_model_runner)
        return UnpadGPUModelRunner(self.vllm_config, self.device)


def _require_v1_runner(use_v2_model_runner: bool) -> None:
    if use_v2_model_runner:
        raise RuntimeError(
            '"method": "emssd" with a draft model runs on vLLM\'s V1 model runner. '
            "Set VLLM_USE_V2_MODEL_RUNNER=0."
        )
