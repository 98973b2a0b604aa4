"""CPU worker classes: vLLM's own, with our model runner in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.distributed import get_tp_group
from vllm.distributed.device_communicators.cpu_communicator import (
    CpuCommunicator,
    _CPUSHMDistributed,
)
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_emssd.integration.cpu.fixes import EXPAND_HOOK
from vllm_emssd.integration.cpu.onednn_cache import KERNELS_HOOK
from vllm_emssd.integration.hooks.hook import Hook, install, installed
from vllm_emssd.integration.worker import EmssdWorkerMixin, runner_class

CPU_RUNNER_HOOK = Hook(
    target="vllm.v1.worker.cpu_worker:CPUModelRunner",
    why="CPUWorker.init_device names its runner class",
    signature="vllm_config, device",
    remove_when="CPUWorker builds its runner in an overridable method",
    make=lambda stock: runner_class(use_v2=False),
    when="while an emssd worker makes its device ready",
    patch="0005-overridable-cpu-model-runner",
)


CPU_RUNNER_V2_HOOK = Hook(
    target="vllm.v1.worker.cpu.model_runner:CPUModelRunner",
    why="the same for the V2 runner, which runs on CPUs with Triton",
    signature="vllm_config, device",
    remove_when="CPUWorker builds its runner in an overridable method",
    make=lambda stock: runner_class(use_v2=True),
    when="while an emssd worker makes its device ready for the V2 runner",
    patch="0005-overridable-cpu-model-runner",
)


class FixedCPUWorker(CPUWorker):
    """vLLM's CPU worker with its kernels repaired, for stock speculation."""

    def init_device(self) -> None:
        install([EXPAND_HOOK])  # after vLLM registered its CPU kernels
        super().init_device()


class UnpadCPUWorker(EmssdWorkerMixin, FixedCPUWorker):
    def init_device(self) -> None:
        is_v2 = self.use_v2_model_runner
        with installed([CPU_RUNNER_V2_HOOK if is_v2 else CPU_RUNNER_HOOK]):
            super().init_device()
        remove_shared_memory_names()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with installed([KERNELS_HOOK]):
            super().load_model(*args, **kwargs)


def remove_shared_memory_names() -> None:
    """Remove the names in /dev/shm of the segments that vLLM's CPU workers of a machine
    share. All workers have opened them by now, as making the group waits for that, and
    the names are not needed any more. If a worker is killed, which Ray does, they would
    stay until the machine restarts, and the memory with them."""
    group = get_tp_group()
    communicator = group.device_communicator
    if not isinstance(communicator, CpuCommunicator):
        return
    collectives = communicator.dist_module
    if isinstance(collectives, _CPUSHMDistributed):
        name = f"{collectives.group_name}_{group.rank_in_group}"
        Path("/dev/shm", name).unlink(missing_ok=True)
