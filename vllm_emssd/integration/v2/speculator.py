"""vLLM's stand-alone draft-model speculator (V2 runner) with unpadded drafting.

Stock feeds the drafter all scheduled rows of every request again, rejected ones
included, and one more, then one row a request and draft: 2K+1 of a decoding request.
This feeds what is missing and drafts for each request as many tokens as its policy
allows, in one of two ways (`knows_acceptance`):

- *exact rows*: the number of accepted drafts is copied to the host before drafting, so
  that a first pass has 1 row, or 2 after a full acceptance. The host waits for the
  target and the device then for the host. Automatic lengths go this way on any device:
  they are chosen by the acceptance, and by how sure each draft is, which is copied too.
- *no copy*: the host launches the drafter by a bound (`AsyncDraftCursor`): 2 rows a
  request, uniform over those that drafted before, K+1 in all; who lags behind is fed
  all it lacks in the same pass. The acceptance reaches the host with the step's output,
  with async scheduling when the next step has been launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import (
    StandaloneARSpeculator,
)
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.async_draft_cursor import AsyncDraftCursor
from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_cursor import DraftCursor
from vllm_emssd.draft_length import DraftLengthPolicy, FixedDraftLength
from vllm_emssd.integration.drafting import (
    block_updates,
    highest_probability,
    make_draft_cursor,
    max_draft_tokens,
)
from vllm_emssd.integration.failure_policy import FailurePolicy
from vllm_emssd.integration.kv_cache import draft_group
from vllm_emssd.integration.request_options import RequestLimits
from vllm_emssd.integration.scheduler import with_drafts_made
from vllm_emssd.integration.v2.cudagraphs import MOST_FIRST_ROWS
from vllm_emssd.integration.v2.drafter import (
    BatchOnDevice,
    KnownTokens,
    PagedDrafterV2,
)
from vllm_emssd.integration.v2.pending_steps import (
    PendingSteps,
    known_tokens,
    scheduled_step,
)
from vllm_emssd.integration.v2.ragged_graphs import takes_ragged_graphs
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.draft_model import DeviceDrafts, DraftModelProposer
from vllm_emssd.verification import ScheduledStep


def copies_acceptance(device: torch.device) -> bool:
    """Whether the host should wait for the acceptance: where that costs nothing."""
    return device.type == "cpu"


class UnpadSpeculator(StandaloneARSpeculator):
    """Owns the proposer, the draft cursor and the counters of one rank."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        *,
        req_states: RequestState,
    ) -> None:
        super().__init__(vllm_config, device)
        config = EmssdConfig.carried_by(vllm_config.additional_config)
        self.is_automatic = config.draft_length == "auto"
        self._ragged_graphs = config.ragged_graphs
        is_async = vllm_config.scheduler_config.async_scheduling
        self.knows_acceptance = self.is_automatic or (
            copies_acceptance(device) and not is_async
        )
        # [num_sampled] float32: of the drafts sampled last; None with fixed lengths
        self.confidence: torch.Tensor | None = None
        # See `DraftForwardGraphs`. Here vLLM finds and drops them after profiling.
        self.first_graphs: SpeculatorCudaGraphManager | None = None
        self.next_graphs: SpeculatorCudaGraphManager | None = None
        self._sits_out_dummy_runs = False
        self.counters = Counters()
        self._failures = FailurePolicy(self.counters, vllm_config.parallel_config)
        self.policy: DraftLengthPolicy = FixedDraftLength()
        self.draft_lens: dict[str, int] = {}  # of the last batch, for the scheduler
        # Of the step's drafts, how many of each request under a grammar obey it.
        self.num_grammar_valid: Mapping[str, int] = {}
        self._num_made: dict[str, int] = {}  # drafts that wait to be verified
        self._req_states = req_states
        self._constrained: set[str] = set()  # requests under a grammar
        self._seeded: set[str] = set()  # requests with a seed
        self._request_limits = RequestLimits()
        self._pending_steps = PendingSteps()
        self._cursor: DraftCursor | AsyncDraftCursor  # both made with the KV cache
        self._proposer: DraftModelProposer

    # ------------------------------------------------------------ start-up

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().set_attn(model_state, kv_cache_config, *args, **kwargs)
        self._gid = draft_group(kv_cache_config, self.draft_attn_layer_names)
        cursor = make_draft_cursor(self.vllm_config, kv_cache_config, self._gid)
        self._cursor = cursor if self.knows_acceptance else AsyncDraftCursor(cursor)
        self._drafter = PagedDrafterV2(
            self, min(self.draft_model_config.max_model_len, self.max_model_len)
        )
        self.set_policy(self.policy)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Draft forwards are recorded whole where the target's are: those of one row
        a request, and the first ones where ragged graphs were asked for."""
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
            return
        mode = CUDAGraphMode.FULL_DECODE_ONLY
        self.next_graphs = SpeculatorCudaGraphManager(
            self.vllm_config, self.device, mode, decode_query_len=1
        )
        if self._ragged_graphs and takes_ragged_graphs(
            self.attn_groups, self.vllm_config, MOST_FIRST_ROWS
        ):
            self.first_graphs = SpeculatorCudaGraphManager(
                self.vllm_config,
                self.device,
                mode,
                decode_query_len=MOST_FIRST_ROWS,
                varlen_decode=True,
            )

    def capture(self) -> None:
        self._drafter.capture()

    def set_policy(
        self,
        policy: DraftLengthPolicy,
        check_agreement: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        """Draft by these lengths from now on. See `DraftModelProposer`."""
        self.policy = policy
        self._proposer = DraftModelProposer(
            self._drafter,
            self._cursor,
            policy,
            self.counters,
            check_agreement,
            feeds_every_prompt=self.vllm_config.kv_transfer_config is not None,
        )

    @contextmanager
    def sitting_out_dummy_runs(self) -> Iterator[PagedDrafterV2]:
        """While costs are measured, of the target and of the drafter, which is lent."""
        self._sits_out_dummy_runs = True
        self._drafter.start_step(
            BatchOnDevice.of_first_states(self.max_num_reqs, self.device)
        )
        try:
            yield self._drafter
        finally:
            self._sits_out_dummy_runs = False

    # ------------------------------------------------------------ before a step

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        """A step's new requests (resumed ones too) and block allocations."""
        admitted, extended = block_updates(scheduler_output, self._gid)
        self._pending_steps.admit(request.req_id for request in admitted)
        self._request_limits.admit(scheduler_output.scheduled_new_reqs)
        for new in scheduler_output.scheduled_new_reqs:
            if (params := new.sampling_params) is None:
                continue
            if params.structured_outputs is not None:
                self._constrained.add(new.req_id)
            if params.seed is not None:
                self._seeded.add(new.req_id)
        self._cursor.update_blocks(admitted, extended)

    def release(self, req_ids: Iterable[str]) -> None:
        """Forget finished requests."""
        req_ids = list(req_ids)
        self.preempt(req_ids)
        self._proposer.release(req_ids)
        self._pending_steps.release(req_ids)
        self._constrained.difference_update(req_ids)
        self._seeded.difference_update(req_ids)
        self._request_limits.release(req_ids)

    def preempt(self, req_ids: Iterable[str]) -> None:
        """Forget drafts that will not be verified, and blocks that were taken away."""
        for req_id in req_ids:
            self._num_made.pop(req_id, None)
            self._cursor.release(req_id)

    def with_drafts_made(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        """An async scheduler schedules K drafts of every request before there are any.
        Those that were not made cost no rows; but under a grammar they stay, since its
        bit mask has a row for each, and are forbidden."""
        drafts = scheduler_output.scheduled_spec_decode_tokens
        return with_drafts_made(
            scheduler_output,
            {r: self._num_made.get(r, 0) for r in drafts if r not in self._constrained},
        )

    # ------------------------------------------------------------ a step

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if dummy_run and self._sits_out_dummy_runs:
            return self.draft_tokens[: input_batch.num_reqs]
        if dummy_run:  # profiling: stock's rows, the most there can be
            return super().propose(
                input_batch,
                attn_metadata,
                slot_mappings,
                last_hidden_states,
                aux_hidden_states,
                num_sampled,
                num_rejected,
                last_sampled,
                next_prefill_tokens,
                temperature,
                seeds,
                *args,
                dummy_run=True,
                **kwargs,
            )
        self._copy_request_inputs(
            input_batch.num_reqs, input_batch.idx_mapping, temperature, seeds
        )
        step = scheduled_step(input_batch, self._req_states, self.num_grammar_valid)
        num_known = known_tokens(input_batch)
        self._pending_steps.add(step)
        if self.knows_acceptance:
            num_sampled_np = self._acceptance(step, num_sampled)
            self.record_acceptance(num_sampled_np)
            accepted = most_accepted = (
                np.maximum(num_sampled_np.astype(np.int64), 1) - 1
            )
        else:
            accepted, most_accepted = self._assume_accepted(step, num_known)
        batch = self._draft_batch(input_batch, step, num_known, accepted, most_accepted)
        try:
            drafts = self._proposer.draft(batch)
        except Exception as error:
            self._failures.take(error)
            drafts = DeviceDrafts.none(batch.num_reqs)
        if isinstance(self._cursor, AsyncDraftCursor):
            self._cursor.end_step()
        return self._to_columns(step.req_ids, drafts)

    def _acceptance(self, step: ScheduledStep, num_sampled: torch.Tensor) -> np.ndarray:
        """Tokens each request sampled: one where no drafts were. [num_reqs] integers"""
        if not step.num_draft_tokens.any():
            return step.is_sampling.astype(np.int64)
        return num_sampled.cpu().numpy()  # sync: how many were accepted

    def record_acceptance(self, num_sampled: np.ndarray) -> None:
        """Move the cursors by what the oldest step whose acceptance was not recorded
        accepted, and count the step. Does nothing where there is none.

        `num_sampled`: [num_reqs] tokens sampled by each request of its batch.
        """
        if not self._pending_steps:
            return
        step, is_wanted = self._pending_steps.pop()
        for i in np.flatnonzero(step.is_sampling & is_wanted):
            req_id, num_accepted = step.req_ids[i], int(num_sampled[i]) - 1
            try:
                self._proposer.record_verified(
                    req_id, int(step.num_draft_tokens[i]), num_accepted
                )
            except Exception as error:
                self._failures.take(error)
                # Does nothing where it was done before the error.
                self._cursor.record_verified(req_id, num_accepted)
        if isinstance(self._cursor, AsyncDraftCursor):
            self._cursor.settle()
        step.count(num_sampled, self.num_speculative_steps, self.counters, is_wanted)

    def compute_draft_logits(
        self, hidden_states: torch.Tensor, spec_step_idx: int
    ) -> torch.Tensor:
        logits = super().compute_draft_logits(hidden_states, spec_step_idx)
        if self.is_automatic:
            self.confidence = highest_probability(logits)
        return logits

    def _assume_accepted(
        self, step: ScheduledStep, num_known: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Accepted tokens to assume until the acceptance, and the most that there can
        be. [num_reqs] int64 both"""
        assert isinstance(self._cursor, AsyncDraftCursor)
        accepted, most_accepted = (np.zeros_like(num_known) for _ in range(2))
        for i in np.flatnonzero(step.is_sampling):
            req_id = step.req_ids[i]
            most_accepted[i] = min(
                step.num_draft_tokens[i], self._num_made.get(req_id, 0)
            )
            accepted[i] = self._cursor.assume_accepted(
                req_id, int(num_known[i]), int(most_accepted[i])
            )
        return accepted, most_accepted

    def _draft_batch(
        self,
        input_batch: InputBatch,
        step: ScheduledStep,
        num_known: np.ndarray,
        accepted: np.ndarray,
        most_accepted: np.ndarray,
    ) -> DraftBatch:
        """All [num_reqs] int64: tokens before the step sampled; accepted ones to assume
        with, and at most, equal where they are known."""
        states = self._req_states
        idx_mapping_np = input_batch.idx_mapping_np
        num_prefilled = num_known + step.num_draft_tokens
        prefill_len = input_batch.prefill_len_np.astype(np.int64)
        num_tokens = np.where(step.is_sampling, num_known + 1 + accepted, prefill_len)
        max_moved_by = most_accepted - accepted
        on_device = self._batch_on_device(input_batch, step, num_tokens, max_moved_by)
        self._drafter.start_step(on_device)
        most = max_draft_tokens(
            num_tokens + max_moved_by,
            self.num_speculative_steps,
            self.max_model_len,
            self._drafter.max_model_len,
            states.max_seq_len[idx_mapping_np] if self.is_automatic else None,
        )
        if self._request_limits:
            rows = {req_id: row for row, req_id in enumerate(step.req_ids)}
            self._request_limits.apply(most, rows)
        return DraftBatch(
            req_ids=step.req_ids,
            token_ids=KnownTokens(states.all_token_ids.gpu, on_device),
            num_tokens=num_tokens,
            num_prompt_tokens=states.prompt_len.np[idx_mapping_np].astype(np.int64),
            num_scheduled_tokens=step.num_scheduled_tokens,
            num_prefilled_tokens=num_prefilled,
            is_sampling=step.is_sampling,
            max_draft_tokens=most,
        )

    def _batch_on_device(
        self,
        input_batch: InputBatch,
        step: ScheduledStep,
        num_tokens: np.ndarray,
        max_moved_by: np.ndarray,
    ) -> BatchOnDevice:
        idx_mapping = input_batch.idx_mapping
        moved_by = None
        if not self.knows_acceptance:
            true_len = self._req_states.total_len.gpu[idx_mapping].long()
            moved_by = true_len - async_tensor_h2d(num_tokens, device=self.device)
        # A grammar cuts drafts by their value, and only greedy ones may be. With a seed
        # a draft is accepted where the target samples it: the likeliest is most often.
        greedy = self._constrained | self._seeded if self._seeded else self._constrained
        is_greedy = np.array([r in greedy for r in step.req_ids], bool)
        if self.draft_logits is not None and is_greedy.any():
            rows = async_tensor_h2d(np.flatnonzero(is_greedy), device=self.device)
            self.temperature[idx_mapping[rows]] = 0.0
        return BatchOnDevice(idx_mapping, moved_by, max_moved_by, is_greedy)

    def _to_columns(self, req_ids: list[str], drafts: DeviceDrafts) -> torch.Tensor:
        """[num_reqs, K] int64 on the device, as vLLM keeps drafts; the rest is 0."""
        self.draft_lens = dict(zip(req_ids, drafts.num_kept.tolist(), strict=True))
        self._num_made.update(self.draft_lens)
        columns = self.draft_tokens[: len(req_ids)].zero_()
        last: np.ndarray | None = None  # forwards of the same requests share it
        for position, (requests, tokens) in enumerate(drafts.made):
            if requests is not last:
                rows, last = async_tensor_h2d(requests, device=self.device), requests
            columns[rows, position] = tokens
        return columns
