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

from vllm_emssd.integration.v2.copy_kernels import (
    EDIT_FIELDS,
    NO_KEY,
    NUM_EDITS,
    NUM_KINDS,
    STATE,
    STATE_SIZE,
    find_copies_kernel,
    observe_copies_kernel,
)
from vllm_emssd.proposers.ngram_index import MAX_MATCH_LENGTH

# Tokens looked at at once. A search waits for memory, not for bandwidth: it takes as
# long as it has blocks.
_LARGEST_BLOCK, _NUM_WARPS = 2048, 8
_REQUESTS_A_BLOCK = 512
_MOST_REPLAYED = 512  # tokens of a resumed answer that are followed in its reference


class DeviceCopier:
    """Args:
    check_length: tokens that must agree before anything is copied, >= 1.
    num_drafts: columns of the drafts, >= 1.
    """

    def __init__(
        self,
        req_states: RequestState,
        check_length: int,
        num_drafts: int,
        device: torch.device,
    ) -> None:
        self._req_states = req_states
        self._check_length = check_length
        self._device = device
        longest = triton.next_power_of_2(req_states.max_model_len)
        self._block_size = min(longest, _LARGEST_BLOCK)
        most = req_states.max_num_reqs
        ints = partial(torch.zeros, dtype=torch.int32, device=device)
        floats = partial(torch.zeros, dtype=torch.float64, device=device)
        self._state = ints(most, STATE_SIZE)
        self._edits = ints(most, EDIT_FIELDS, NUM_EDITS)
        self._records = floats(most, NUM_KINDS, 2)
        self._pools = floats(NUM_KINDS, 2)
        self._num_idle = ints(NUM_KINDS)
        self._references: dict[int, torch.Tensor] = {}  # by slot
        self._addresses = torch.zeros(most, dtype=torch.int64, device=device)
        self.drafts = torch.zeros(most, num_drafts, dtype=torch.int64, device=device)
        self._found = floats(most, 2)

    def admit(
        self, slot: int, most_drafts: int, reference: np.ndarray | None = None
    ) -> None:
        """A request took the slot.

        Args:
            most_drafts: of it in a step, >= 0.
            reference: [num_tokens] int32 valid ids, perhaps none.
        """
        states = self._req_states
        row = dict.fromkeys(STATE, 0)
        row["most_drafts"], row["departure"] = most_drafts, -1
        row["end"] = int(states.max_seq_len[slot])
        num_known = int(states.prefill_len.np[slot])
        prompt_len = int(states.prompt_len.np[slot])
        row["num_followed"] = max(prompt_len, num_known - _MOST_REPLAYED)
        self.release(slot)
        if reference is not None and len(reference):
            row["reference_len"] = len(reference)
            tokens = async_tensor_h2d(reference, device=self._device)
            self._references[slot] = tokens
            self._addresses[slot] = tokens.data_ptr()
        values = np.array(list(row.values()), dtype=np.int32)
        self._state[slot] = async_tensor_h2d(values, device=self._device)
        self._edits[slot] = NO_KEY
        self._records[slot] = 0

    def release(self, slot: int) -> None:
        """The request in the slot, if any, has gone."""
        self._references.pop(slot, None)

    def forget(self) -> None:
        """How copies of all requests fared."""
        self._pools.zero_()
        self._num_idle.zero_()

    def forget_copies(self) -> None:
        """Those not yet verified."""
        self._state[:, STATE.index("num_copied")] = 0

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
        observe_copies_kernel[(NUM_KINDS,)](
            idx_mapping,
            num_sampled,
            first_rows,
            self._state,
            self._records,
            self._pools,
            self._num_idle,
            num_reqs,
            BLOCK_SIZE=_REQUESTS_A_BLOCK,
        )
        num_columns = self.drafts.shape[1]
        find_copies_kernel[(num_reqs,)](
            idx_mapping,
            num_sampled,
            first_rows,
            states.total_len.gpu,
            states.prompt_len.gpu,
            token_ids,
            token_ids.stride(0),
            token_ids.data_ptr(),
            self._addresses,
            self._state,
            self._edits,
            self._records,
            self._pools,
            self._num_idle,
            self.drafts,
            self._found,
            states.max_model_len,
            K=num_columns,
            K_PADDED=triton.next_power_of_2(num_columns),
            CHECK_LENGTH=self._check_length,
            TAIL_LENGTH=max(MAX_MATCH_LENGTH, self._check_length),
            BLOCK_SIZE=self._block_size,
            num_warps=_NUM_WARPS,
        )
        return self.drafts[:num_reqs], self._found[:num_reqs]
