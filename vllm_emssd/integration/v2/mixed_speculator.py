"""Copies beside a model's drafts, on vLLM's V2 runner: the proposer `mixed`.

A request either copies or drafts, as on the V1 runner. The host has to know which: one
that copies is not fed to the drafter, and what it lacks is fed when it drafts again.
So the choice goes by the copies that the host knows of, which with asynchronous
scheduling are those of the step before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_length import Copies
from vllm_emssd.integration.v2.copy_source import FoundCopies
from vllm_emssd.integration.v2.drafting_speculator import DraftingSpeculator
from vllm_emssd.integration.v2.eagle_speculator import UnpadEagleSpeculator
from vllm_emssd.integration.v2.kernels import make_certain
from vllm_emssd.integration.v2.speculator import UnpadSpeculator
from vllm_emssd.proposers.mixed import DRAFT_MODEL, LLMA, ModelDrafts, check_source
from vllm_emssd.verification import ScheduledStep


class Mixing(DraftingSpeculator):
    """Of a drafter, whichever it is."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        *,
        req_states: RequestState,
    ) -> None:
        super().__init__(vllm_config, device, req_states=req_states)
        # vLLM has the texts in the host's memory unless its own n-grams are looked up.
        texts = req_states.all_token_ids.gpu
        req_states.all_token_ids = StagedWriteTensor(
            texts.shape, dtype=texts.dtype, device=device
        )
        self._source = self._copy_source(vllm_config, device)
        config = EmssdConfig.carried_by(vllm_config.additional_config)
        self._copy_length = config.copy_length
        self._model_drafts = ModelDrafts()
        self._only: str | None = None

    def use(self, only: str | None) -> None:
        """See `MixedProposer.use`."""
        check_source(only)
        self._only = only

    def forget_warm_up(self) -> None:
        self._source.forget_warm_up()
        self._model_drafts = ModelDrafts()

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().update_requests(scheduler_output)
        new_reqs = scheduler_output.scheduled_new_reqs
        self._source.admit(new_reqs, self._most_of(new_reqs, self._copy_length))

    def _vacate(self, slot: int) -> None:
        super()._vacate(slot)
        self._source.release(slot)

    def _find_copies(
        self, input_batch: InputBatch, step: ScheduledStep, num_sampled: torch.Tensor
    ) -> FoundCopies:
        was_copied = self._is_copied[input_batch.idx_mapping_np]
        found = self._source.find(input_batch, step, num_sampled, was_copied)
        if self._only == DRAFT_MODEL:
            found.copies.rows[:] = 0
        return found

    def _plan(
        self, input_batch: InputBatch, step: ScheduledStep, *args: Any
    ) -> np.ndarray:
        if self._only == LLMA:
            return np.zeros_like(step.num_draft_tokens)
        return super()._plan(input_batch, step, *args)

    def _may_draft(
        self, most: np.ndarray, missing: np.ndarray, copies: Copies | None
    ) -> np.ndarray:
        if self.is_automatic:  # then the policy weighs them
            return most
        assert copies is not None
        loses = self._model_drafts.lose_to(copies, most, missing)
        return np.where(loses, 0, most)

    def _add_copies(
        self,
        input_batch: InputBatch,
        drafts: torch.Tensor,
        num_made: np.ndarray,
        copies: Copies,
    ) -> np.ndarray:
        is_copied = (num_made == 0) & (copies.rows > 0)
        self._is_copied[input_batch.idx_mapping_np] = is_copied
        if self.draft_logits is not None and is_copied.any():
            rows = async_tensor_h2d(np.flatnonzero(is_copied), device=self.device)
            states, most = input_batch.idx_mapping, self._copy_length
            make_certain(self.draft_logits, rows, states, drafts, most)
        return np.where(is_copied, copies.rows, num_made)

    def _learn_acceptance(
        self, num_verified: np.ndarray, num_accepted: np.ndarray
    ) -> None:
        super()._learn_acceptance(num_verified, num_accepted)
        has_verified = num_verified > 0
        self._model_drafts.observe_step(
            num_verified[has_verified], num_accepted[has_verified]
        )


class MixedSpeculator(Mixing, UnpadSpeculator):
    pass


class MixedEagleSpeculator(Mixing, UnpadEagleSpeculator):
    pass
