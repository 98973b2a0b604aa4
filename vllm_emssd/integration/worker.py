"""Worker classes: vLLM's own, with our model runner in them."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_emssd.integration import hooks
from vllm_emssd.integration.cpu_fixes import install_cpu_fixes
from vllm_emssd.integration.runner_v1 import UnpadCPUModelRunner, UnpadGPUModelRunner
from vllm_emssd.integration.shared_memory import remove_names

CPU_RUNNER_HOOK = hooks.Hook(
    target="vllm.v1.worker.cpu_worker:CPUModelRunner",
    why="CPUWorker.init_device names its runner class; in place only while it runs",
    signature="vllm_config, device",
    upstream="a _make_model_runner method on CPUWorker, as the GPU worker has",
    remove_when="CPUWorker builds its runner in an overridable method",
    make=lambda stock: UnpadCPUModelRunner,
)


class _EmssdStats:
    model_runner: UnpadCPUModelRunner | UnpadGPUModelRunner

    def emssd_stats(self) -> dict[str, int]:
        """This rank's counters since start: `llm.collective_rpc("emssd_stats")`."""
        return self.model_runner.counters.as_dict()


class FixedCPUWorker(CPUWorker):
    """vLLM's CPU worker with its kernels repaired, for stock speculation."""

    def init_device(self) -> None:
        install_cpu_fixes()
        super().init_device()


class UnpadCPUWorker(_EmssdStats, FixedCPUWorker):
    def compile_or_warm_up_model(self) -> CompilationTimes:
        times = super().compile_or_warm_up_model()
        self.model_runner.start_automatic_lengths()
        return times

    def init_device(self) -> None:
        _require_v1_runner(self.use_v2_model_runner)
        with hooks.installed([CPU_RUNNER_HOOK]):
            super().init_device()
        remove_names()


class UnpadGPUWorker(_EmssdStats, Worker):
    def _make_model_runner(self) -> GPUModelRunner:
        _require_v1_runner(self.use_v2_model_runner)
        return UnpadGPUModelRunner(self.vllm_config, self.device)


def _require_v1_runner(use_v2_model_runner: bool) -> None:
    if use_v2_model_runner:
        raise RuntimeError(
            '"method": "emssd" with a draft model runs on vLLM\'s V1 model runner. '
            "Set VLLM_USE_V2_MODEL_RUNNER=0."
        )
