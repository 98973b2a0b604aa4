"""Steps of the V2 runner as the host sees them, which learns late what came of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.verification import ScheduledStep


def scheduled_step(
    input_batch: InputBatch,
    req_states: RequestState,
    num_grammar_valid: Mapping[str, int],
) -> ScheduledStep:
    """`num_grammar_valid`: drafts that a grammar permits, of the requests under one."""
    num_scheduled = input_batch.num_scheduled_tokens.astype(np.int64)
    num_drafts = input_batch.num_draft_tokens_per_req
    if num_drafts is None:
        num_drafts = np.zeros(input_batch.num_reqs)
    num_drafts = num_drafts.astype(np.int64)
    num_computed = input_batch.num_computed_tokens_np
    num_forbidden = np.zeros_like(num_drafts)
    if num_grammar_valid:
        asked = zip(input_batch.req_ids, num_drafts.tolist(), strict=True)
        grammar_valid = [num_grammar_valid.get(r, num) for r, num in asked]
        num_forbidden = np.maximum(num_drafts - grammar_valid, 0)
    return ScheduledStep(
        req_ids=input_batch.req_ids,
        num_scheduled_tokens=num_scheduled,
        num_draft_tokens=num_drafts,
        is_decode=num_computed >= req_states.prompt_len.np[input_batch.idx_mapping_np],
        is_sampling=num_computed + num_scheduled >= input_batch.prefill_len_np,
        num_forbidden=num_forbidden,
    )


class AsyncHostCopy:
    """An array of the device on its way to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copied_at = torch.cuda.Event()
        self._array = async_copy_to_np(tensor)
        self._copied_at.record()

    def wait(self) -> np.ndarray:
        self._copied_at.synchronize()
        return self._array


@dataclass(slots=True)
class PendingStep:
    """A step whose acceptance is to come. Arrays are [num_reqs].

    By the time it comes a request may have ended in an earlier step, or its id may be
    another's: with async scheduling a step is launched before the last one's tokens are
    known. So requests are told apart by the number of their admission.
    """

    step: ScheduledStep
    admission_ids: np.ndarray  # int64
    is_wanted: np.ndarray = field(init=False)  # bool: had not ended before

    def __post_init__(self) -> None:
        self.is_wanted = np.ones(len(self.admission_ids), dtype=bool)

    def forget(self, admission_id: int) -> None:
        """The request of this admission has ended."""
        self.is_wanted &= self.admission_ids != admission_id
