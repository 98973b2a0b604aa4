"""The GPU worker class: vLLM's own, with our model runner in it.

Apart from the CPU worker, whose module makes no-ops of torch's CUDA streams, events
and copies as soon as it is imported.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_emssd.integration.worker import EmssdWorkerMixin


class UnpadGPUWorker(EmssdWorkerMixin, Worker):
    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            from vllm_emssd.integration.v2.runner import UnpadGPUModelRunnerV2

            return UnpadGPUModelRunnerV2(self.vllm_config, self.device)
        from vllm_emssd.integration.v1.runner import UnpadGPUModelRunner

        return UnpadGPUModelRunner(self.vllm_config, self.device)
