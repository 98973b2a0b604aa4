"""Copies as drafts, on vLLM's V2 runner: the proposer `llma`, found on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.config import EmssdConfig
from vllm_emssd.integration.v2.pending_steps import scheduled_step
from vllm_emssd.integration.v2.ragged_speculator import RaggedSpeculator
from vllm_emssd.verification import ScheduledStep


class CopySpeculator(RaggedSpeculator):
    supports_mm_inputs = False
    has_draft_model = False
    draft_logits = None  # copies are certain

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        config = EmssdConfig.carried_by(vllm_config.additional_config)
        self.num_speculative_steps = config.num_speculative_tokens
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self._begin(vllm_config, req_states)
        self._source = self._copy_source(vllm_config, device)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """There is no forward to record."""

    def capture(self) -> None:
        """There is no forward to record."""

    def forget_warm_up(self) -> None:
        self._source.forget_warm_up()

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().update_requests(scheduler_output)
        new_reqs = scheduler_output.scheduled_new_reqs
        most = self._most_of(new_reqs, self.num_speculative_steps)
        self._source.admit(new_reqs, most)

    def _vacate(self, slot: int) -> None:
        self._source.release(slot)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if dummy_run:
            return self._source.no_copies(input_batch.num_reqs)
        step = scheduled_step(input_batch, self._req_states, self.num_grammar_valid)
        found = self._source.find(input_batch, step, num_sampled)
        slots = input_batch.idx_mapping_np
        self._pending_steps.add(step, self._numbers[slots], None)
        self._note_made(step.req_ids, slots, found.copies.rows)
        return found.token_ids

    def _settle(
        self,
        step: ScheduledStep,
        left: Any,
        num_accepted: np.ndarray,
        is_wanted: np.ndarray,
    ) -> None:
        """The device knows how copies fared."""
