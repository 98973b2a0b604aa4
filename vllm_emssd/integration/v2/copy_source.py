"""Copies for the speculators that make them, found on the device and told to the host.

How many tokens were copied is known on the device alone. A synchronous scheduler waits
for it, right behind the sampler. An asynchronous one has scheduled the next step by
then, so the host goes by what the step before found. That it waits for, which costs
nothing: a forward of the target is queued behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_length import Copies
from vllm_emssd.integration.failure_policy import FailurePolicy
from vllm_emssd.integration.request_options import reference_of
from vllm_emssd.integration.v2.copier import DeviceCopier
from vllm_emssd.integration.v2.pending_steps import AsyncHostCopy
from vllm_emssd.verification import ScheduledStep


class CopySource:
    """Has the device find copies, and says what the host knows of them.

    Args:
        admission_ids: [max_num_reqs] int64 by slot; the caller's.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        req_states: RequestState,
        admission_ids: np.ndarray,
        failures: FailurePolicy,
    ) -> None:
        config = EmssdConfig.carried_by(vllm_config.additional_config)
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._req_states = req_states
        self.copier = DeviceCopier(req_states, config.check_length)
        self._failures = failures
        self._waits = not vllm_config.scheduler_config.async_scheduling
        self._is_warm_up = True  # vLLM's own: then all drafts are verified
        self._admission_ids = admission_ids
        # By slot: most drafts, and what was found in the step last known.
        self._most, self._num_copied = np.zeros((2, req_states.max_num_reqs), np.int64)
        self._gains = np.zeros(req_states.max_num_reqs)
        # Of the last step: slots, admissions, and what was found.
        self._last: tuple[np.ndarray, np.ndarray, AsyncHostCopy] | None = None

    def forget_warm_up(self) -> None:
        """How copies fared so far, of requests that do not count."""
        self._is_warm_up = False
        self.copier.forget()

    def admit(self, new_reqs: Sequence[NewRequestData], most: np.ndarray) -> None:
        """New requests (resumed ones too). `most`: [num_new] drafts of each."""
        for new, max_drafts in zip(new_reqs, most.tolist(), strict=True):
            slot = self._req_states.req_id_to_index[new.req_id]
            reference = reference_of(new.sampling_params, self._vocab_size)
            try:
                self.copier.admit(slot, max_drafts, reference)
            except torch.OutOfMemoryError as error:  # vLLM left no room for references
                self._failures.take(error)
                self.copier.admit(slot, max_drafts)
            self._most[slot], self._num_copied[slot] = max_drafts, 0

    def find(
        self,
        input_batch: InputBatch,
        step: ScheduledStep,
        num_sampled: torch.Tensor,
        was_copied: np.ndarray | bool = True,
    ) -> tuple[torch.Tensor, Copies]:
        """What requests may copy after what they sampled.

        Args:
            num_sampled: [num_reqs] int32, on the device.
            was_copied: [num_reqs] bool: the drafts verified were copies.

        Returns: [num_reqs, K] int64 on the device, those not copied any tokens; and how
        many are to be verified, by what the host knows, of this step or of the one
        before. Where that is more than was copied, the rest is the request's last token
        again.
        """
        slots = input_batch.idx_mapping_np
        if not self._waits:
            self._learn()
        try:
            token_ids, found = self.copier.find(
                input_batch.idx_mapping,
                num_sampled,
                self._first_rows(input_batch, step, was_copied),
            )
            self._last = slots, self._admission_ids[slots], AsyncHostCopy(found)
        except Exception as error:
            self._failures.take(error)
            self.copier.forget_copies()
            token_ids = self.copier.drafts[: len(slots)]  # any tokens
            self._last, self._num_copied[slots] = None, 0
        if self._waits:
            self._learn()
        rows = self._num_copied[slots]
        if not self._waits:
            rows = np.where((rows > 0) | self._is_warm_up, self._most[slots], 0)
        rows = np.where(step.is_sampling, rows, 0)
        return token_ids, Copies(rows, self._gains[slots])

    def _first_rows(
        self,
        input_batch: InputBatch,
        step: ScheduledStep,
        was_copied: np.ndarray | bool,
    ) -> torch.Tensor:
        """[num_reqs + 1] int32 on the device: of each request's rows, but for drafts
        that say nothing of copies."""
        first_rows = input_batch.cu_num_logits
        if np.all(was_copied) and not np.any(step.num_forbidden):
            return first_rows
        num_copied = step.num_possible_drafts * was_copied
        ends = np.concatenate([[0], (1 + num_copied).cumsum()]).astype(np.int32)
        return async_tensor_h2d(ends, device=first_rows.device)

    def _learn(self) -> None:
        """What the last step found, of requests that are still there."""
        if self._last is None:
            return
        slots, admission_ids, late = self._last
        self._last, found = None, late.wait()
        is_same = self._admission_ids[slots] == admission_ids
        slots = slots[is_same]
        self._num_copied[slots] = found[is_same, 0].astype(np.int64)
        self._gains[slots] = found[is_same, 1]
