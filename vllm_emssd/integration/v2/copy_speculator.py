"""Copies as drafts, on vLLM's V2 runner: the proposer `llma`, found on the device.

How many drafts a request has is known on the device alone. A synchronous scheduler
asks, and waits for a kernel that ran right behind the sampler. An asynchronous one
schedules K of every request before the last step's tokens are known: there a request
that copied nothing in the last step that the host knows of gets none, and the others
get K, of which those not copied are the last token again. Any drafts keep the output
exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.config import EmssdConfig
from vllm_emssd.integration.request_options import reference_of
from vllm_emssd.integration.v2.copier import DeviceCopier
from vllm_emssd.integration.v2.pending_steps import scheduled_step
from vllm_emssd.integration.v2.ragged_speculator import RaggedSpeculator
from vllm_emssd.verification import ScheduledStep


class _LateLengths:
    """[num_reqs] int32 on their way from the device."""

    def __init__(self, num_drafts: torch.Tensor) -> None:
        self._copied_at = torch.cuda.Event()
        self._np = async_copy_to_np(num_drafts)
        self._copied_at.record()

    def wait(self) -> np.ndarray:
        self._copied_at.synchronize()
        return self._np


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
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._copier = DeviceCopier(
            req_states,
            config.check_length,
            self.num_speculative_steps,
            device,
        )
        self._is_warm_up = True  # vLLM's own: then all drafts are verified
        self._num_admitted = 0
        self._numbers_by_slot = np.zeros(self.max_num_reqs, np.int64)
        # By slot: whether it copied in the last step known.
        self._copies = np.zeros(self.max_num_reqs, bool)
        self._last_step: tuple[list[str], _LateLengths | None] = [], None

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """There is no forward to record."""

    def capture(self) -> None:
        """There is no forward to record."""

    def forget_warm_up(self) -> None:
        """How copies fared so far, of requests that do not count."""
        self._is_warm_up = False
        self._copier.forget()

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().update_requests(scheduler_output)
        new_reqs = scheduler_output.scheduled_new_reqs
        rows = {new.req_id: row for row, new in enumerate(new_reqs)}
        most = np.full(len(new_reqs), self.num_speculative_steps)
        self._request_limits.apply(most, rows)
        for new, most_drafts in zip(new_reqs, most.tolist(), strict=True):
            slot = self._req_states.req_id_to_index[new.req_id]
            reference = reference_of(new.sampling_params, self._vocab_size)
            self._admit(slot, most_drafts, reference)
            self._num_admitted += 1
            self._numbers[new.req_id] = self._num_admitted
            self._numbers_by_slot[slot] = self._num_admitted
            self._copies[slot] = False

    def _admit(self, slot: int, most_drafts: int, reference: np.ndarray | None) -> None:
        try:
            self._copier.admit(slot, most_drafts, reference)
        except torch.OutOfMemoryError as error:  # vLLM left no room for references
            self._failures.take(error)
            self._copier.admit(slot, most_drafts)

    def preempt(self, req_ids: Iterable[str]) -> None:
        req_ids = list(req_ids)
        super().preempt(req_ids)
        for req_id in req_ids:
            slot = self._req_states.req_id_to_index.get(req_id)
            if slot is not None:
                self._copier.release(slot)

    def with_drafts_made(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        slot_of = self._req_states.req_id_to_index
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        if not self._is_warm_up:
            self._makes_fewer = {
                r: 0 for r in scheduled if not self._copies[slot_of[r]]
            }
        return super().with_drafts_made(scheduler_output)

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
        num_reqs = input_batch.num_reqs
        if dummy_run:
            return self._copier.drafts[:num_reqs]
        step = scheduled_step(input_batch, self._req_states, self.num_grammar_valid)
        slots = input_batch.idx_mapping_np
        lengths = None
        try:
            first_rows = input_batch.cu_num_logits
            if np.any(step.num_forbidden):  # they say nothing of copies
                num_rows = 1 + step.num_draft_tokens - step.num_forbidden
                ends = np.concatenate([[0], num_rows.cumsum()]).astype(np.int32)
                first_rows = async_tensor_h2d(ends, device=first_rows.device)
            drafts, num_drafts = self._copier.find(
                input_batch.idx_mapping, num_sampled, first_rows
            )
            lengths = _LateLengths(num_drafts)
        except Exception as error:
            self._failures.take(error)
            self._copier.forget_copies()
            drafts = self._copier.drafts[:num_reqs]
        numbers = self._numbers_by_slot[slots]
        self._pending_steps.add(step, numbers, (slots, numbers, lengths))
        self._last_step = step.req_ids, lengths
        return drafts

    @property
    def draft_lens(self) -> dict[str, int]:
        """Of the last batch. Waits for the device."""
        req_ids, lengths = self._last_step
        if lengths is None:
            return dict.fromkeys(req_ids, 0)
        return dict(zip(req_ids, lengths.wait().tolist(), strict=True))

    def _settle(
        self,
        step: ScheduledStep,
        left: Any,
        num_accepted: np.ndarray,
        is_wanted: np.ndarray,
    ) -> None:
        slots, numbers, lengths = left
        lens = np.zeros_like(slots) if lengths is None else lengths.wait()
        is_same = self._numbers_by_slot[slots] == numbers
        self._copies[slots[is_same]] = lens[is_same] > 0
