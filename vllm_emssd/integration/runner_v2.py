"""vLLM's V2 model runner with the unpadded speculator.

The runner keeps all it does: ragged verification, structured output, logprobs and
sampling go through stock's own paths. This class puts our speculator in, passes on
the scheduler's block allocations and the target's verdicts, and tells the scheduler
how many drafts each request has.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_emssd.config import ADDITIONAL_CONFIG_KEY, EmssdConfig
from vllm_emssd.integration import hooks
from vllm_emssd.integration.prometheus import open_shared_counters
from vllm_emssd.integration.speculator_v2 import (
    INIT_SPECULATOR_HOOK,
    UnpadSpeculator,
    register_speculator,
)
from vllm_emssd.integration.v2_limits import refuse_deployment, refuse_options
from vllm_emssd.metrics import Counters


class UnpadGPUModelRunnerV2(GPUModelRunner):
    speculator: UnpadSpeculator

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        options = vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]
        self.emssd_config = EmssdConfig(**options)
        refuse_options(self.emssd_config)
        refuse_deployment(vllm_config)
        register_speculator()
        with hooks.installed([INIT_SPECULATOR_HOOK]):
            super().__init__(vllm_config, device)
        self._output: AsyncOutput | None = None  # with a verdict not yet recorded
        parallel_config = vllm_config.parallel_config
        self._shared_counters = (
            open_shared_counters(parallel_config.data_parallel_index)
            if parallel_config.rank == 0
            else None
        )

    def start_automatic_lengths(self) -> None:
        """Warm-up is over, whose requests do not count. Lengths stay fixed."""
        self._record_verdict()
        self.speculator.reset_counters()

    @property
    def counters(self) -> Counters:
        self._record_verdict()
        return self.speculator.counters

    def costs_now(self) -> dict[str, Any]:
        """See the worker's `emssd_costs`: lengths are fixed on this runner."""
        return {}

    # ------------------------------------------------------------ a step

    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> Any:
        self._record_verdict()
        return super().execute_model(scheduler_output, *args, **kwargs)

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        self.speculator.release(scheduler_output.finished_req_ids)
        super().finish_requests(scheduler_output)

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        self.speculator.take_in(scheduler_output)
        super().update_requests(scheduler_output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        if isinstance(output, AsyncOutput):
            self._output = output
        return output

    def _record_verdict(self) -> None:
        """How many tokens the last step sampled; its output has been read by now."""
        output, self._output = self._output, None
        if output is None:
            return
        output.copy_event.synchronize()
        self.speculator.record_verdict(output.num_sampled_tokens_np)
        if self._shared_counters is not None:
            self._shared_counters.publish(self.speculator.counters)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Ragged drafts for the scheduler, which mostly counts them: without a grammar
        in the batch stock leaves their ids on the device and says -1, which is also
        its padding; here it is 0."""
        drafts = super().take_draft_token_ids()
        if drafts is None:
            return None
        lens = self.speculator.draft_lens
        return DraftTokenIds(
            drafts.req_ids,
            [
                [max(token, 0) for token in tokens[: lens[req_id]]]
                for req_id, tokens in zip(
                    drafts.req_ids, drafts.draft_token_ids, strict=True
                )
            ],
        )


class UnpadCPUModelRunnerV2(UnpadGPUModelRunnerV2, CPUModelRunner):
    pass
