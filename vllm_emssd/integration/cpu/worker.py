"""CPU worker classes: vLLM's own, with our model runner in them."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_emssd.integration.cpu.fixes import install_cpu_fixes
from vllm_emssd.integration.cpu.onednn_cache import KERNELS_HOOK
from vllm_emssd.integration.cpu.shared_memory import remove_names
from vllm_emssd.integration.hooks import hook as hooks
from vllm_emssd.integration.v1.runner import UnpadCPUModelRunner
from vllm_emssd.integration.worker import EmssdWorkerMixin

CPU_RUNNER_HOOK = hooks.Hook(
    target="vllm.v1.worker.cpu_worker:CPUModelRunner",
    why="CPUWorker.init_device names its runner class",
    signature="vllm_config, device",
    upstream="a _make_model_runner method on CPUWorker, as the GPU worker has",
    remove_when="CPUWorker builds its runner in an overridable method",
    make=lambda stock: UnpadCPUModelRunner,
    when="while an emssd worker makes its device ready",
    patch="0005-overridable-cpu-model-runner",
)


def _make_cpu_runner_v2(stock: Any) -> Any:
    from vllm_emssd.integration.v2.runner import UnpadCPUModelRunnerV2

    return UnpadCPUModelRunnerV2


CPU_RUNNER_V2_HOOK = hooks.Hook(
    target="vllm.v1.worker.cpu.model_runner:CPUModelRunner",
    why="the same for the V2 runner, which runs on CPUs with Triton",
    signature="vllm_config, device",
    upstream="a _make_model_runner method on CPUWorker, as the GPU worker has",
    remove_when="CPUWorker builds its runner in an overridable method",
    make=_make_cpu_runner_v2,
    when="while an emssd worker makes its device ready for the V2 runner",
    patch="0005-overridable-cpu-model-runner",
)


class FixedCPUWorker(CPUWorker):
    """vLLM's CPU worker with its kernels repaired, for stock speculation."""

    def init_device(self) -> None:
        install_cpu_fixes()
        super().init_device()


class UnpadCPUWorker(EmssdWorkerMixin, FixedCPUWorker):
    def init_device(self) -> None:
        is_v2 = self.use_v2_model_runner
        with hooks.installed([CPU_RUNNER_V2_HOOK if is_v2 else CPU_RUNNER_HOOK]):
            super().init_device()
        remove_names()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with hooks.installed([KERNELS_HOOK]):
            super().load_model(*args, **kwargs)
