"""What requests may copy, found on the device: `LlmaProposer` for texts that are there.

Two kernels a step look at the texts, at what was sampled and at how earlier copies
fared; the host waits for nothing. It does not index long texts bit by bit, forgets the
oldest of many edits, and begins anew with a request that was preempted.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from vllm.triton_utils import triton
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.integration.v2 import copy_kernels as kernels

# Tokens looked at at once. A search waits for memory, not for bandwidth: it takes as
# long as it has blocks.
_LARGEST_BLOCK, _NUM_WARPS = 2048, 8
_REQUESTS_A_BLOCK = 512
_MAX_REPLAYED = 512  # tokens of a resumed answer that are followed in its reference


class DeviceCopier:
    """Args:
    check_length: tokens that must agree before anything is copied, >= 1.
    """

    def __init__(self, req_states: RequestState, check_length: int) -> None:
        device, num_drafts = req_states.device, req_states.num_speculative_steps
        self._req_states = req_states
        self._check_length = check_length
        self._device = device
        longest = triton.next_power_of_2(req_states.max_model_len)
        self._block_size = min(longest, _LARGEST_BLOCK)
        most = req_states.max_num_reqs
        ints = partial(torch.zeros, dtype=torch.int32, device=device)
        floats = partial(torch.zeros, dtype=torch.float64, device=device)
        num_kinds = kernels.NUM_KINDS.value
        self._state = ints(most, kernels.STATE_SIZE.value)
        fields, max_edits = kernels.EDIT_FIELDS.value, kernels.MAX_EDITS.value
        self._edits = ints(most, fields, max_edits)
        self._records = floats(num_kinds, 2)
        self._num_idle = ints(num_kinds)
        self._references: dict[int, torch.Tensor] = {}  # by slot
        self._addresses = torch.zeros(most, dtype=torch.int64, device=device)
        self.drafts = torch.zeros(most, num_drafts, dtype=torch.int64, device=device)
        self._found = floats(most, 2)

    def admit(
        self, slot: int, max_drafts: int, reference: np.ndarray | None = None
    ) -> None:
        """A request took the slot.

        Args:
            max_drafts: of it in a step, >= 0.
            reference: [num_tokens] int32 valid ids, perhaps none.
        """
        states = self._req_states
        row = np.zeros(kernels.STATE_SIZE.value, np.int32)
        row[kernels.MAX_DRAFTS.value] = max_drafts
        row[kernels.END.value] = states.max_seq_len[slot]
        row[kernels.DEPARTURE.value] = -1
        num_known, prompt_len = states.prefill_len.np[slot], states.prompt_len.np[slot]
        row[kernels.NUM_FOLLOWED.value] = max(prompt_len, num_known - _MAX_REPLAYED)
        self.release(slot)
        if reference is not None and len(reference):
            row[kernels.REFERENCE_LEN.value] = len(reference)
            tokens = async_tensor_h2d(reference, device=self._device)
            self._references[slot] = tokens
            self._addresses[slot] = tokens.data_ptr()
        self._state[slot] = async_tensor_h2d(row, device=self._device)
        self._edits[slot] = kernels.NO_KEY

    def release(self, slot: int) -> None:
        """The request in the slot, if any, has gone."""
        self._references.pop(slot, None)

    def forget(self) -> None:
        """How copies fared."""
        self._records.zero_()
        self._num_idle.zero_()

    def forget_copies(self) -> None:
        """Those not yet verified."""
        self._state[:, kernels.NUM_COPIED.value] = 0

    @torch.inference_mode()
    def find(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        first_rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of each request, whose text has what was sampled.

        Args:
            idx_mapping: [num_reqs] int64 request states, on the device.
            num_sampled: [num_reqs] int32, on the device; 0 where nothing was.
            first_rows: [num_reqs + 1] int32, on the device: where among the rows
                verified each request's begin, its drafts and one more, and their end.

        Returns: on the device, overwritten by the next call: [num_reqs, K] int64, those
        not made any tokens; and [num_reqs, 2] float64 how many are made, and how many
        of them are expected to be accepted.
        """
        states, num_reqs = self._req_states, len(idx_mapping)
        token_ids = states.all_token_ids.gpu
        kernels.observe_copies_kernel[(kernels.NUM_KINDS.value,)](
            idx_mapping,
            num_sampled,
            first_rows,
            states.total_len.gpu,
            states.prompt_len.gpu,
            token_ids.data_ptr(),
            token_ids.stride(0),
            self._addresses,
            self._state,
            self._records,
            self._num_idle,
            num_reqs,
            BLOCK_SIZE=_REQUESTS_A_BLOCK,
        )
        num_columns = self.drafts.shape[1]
        kernels.find_copies_kernel[(num_reqs,)](
            idx_mapping,
            num_sampled,
            states.total_len.gpu,
            token_ids,
            token_ids.stride(0),
            self._addresses,
            self._state,
            self._edits,
            self._records,
            self._num_idle,
            self.drafts,
            self._found,
            states.max_model_len,
            K=num_columns,
            K_PADDED=triton.next_power_of_2(num_columns),
            CHECK_LENGTH=self._check_length,
            BLOCK_SIZE=self._block_size,
            num_warps=_NUM_WARPS,
        )
        return self.drafts[:num_reqs], self._found[:num_reqs]
