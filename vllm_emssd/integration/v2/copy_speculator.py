"""Copies as drafts, on vLLM's V2 runner: the proposer `llma`, found on the device."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.config import EmssdConfig
from vllm_emssd.integration.v2.copy_source import CopySource
from vllm_emssd.integration.v2.pending_steps import PendingStep, scheduled_step
from vllm_emssd.integration.v2.ragged_speculator import RaggedSpeculator


class CopySpeculator(RaggedSpeculator):
    """The device knows how copies fared, so nothing is to be settled."""

    supports_mm_inputs = False
    has_draft_model = False
    draft_logits = None  # copies are certain
    _source: CopySource

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, *, req_states: RequestState
    ) -> None:
        config = EmssdConfig.carried_by(vllm_config.additional_config)
        self.num_speculative_steps = config.num_speculative_tokens
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self._begin(vllm_config, req_states)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """There is no forward to record."""

    def capture(self) -> None:
        """There is no forward to record."""

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
            return self._source.copier.drafts[: input_batch.num_reqs]
        slots = input_batch.idx_mapping_np
        step = scheduled_step(input_batch, self._req_states, self.num_grammar_valid)
        token_ids, copies = self._source.find(input_batch, step, num_sampled)
        self._pending_steps.append(PendingStep(step, self._admission_ids[slots]))
        self._note_made(step.req_ids, slots, copies.rows)
        return token_ids
