"""vLLM's V1 model runner with unpadded drafting after each step.

The runner keeps all it does; this class listens to the scheduler's block
allocations, replaces the proposal of drafts, and counts. `UnpadRunnerMixin` goes in
front of vLLM's CPU and GPU runner classes alike.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_cursor import DraftCursor
from vllm_emssd.draft_length import (
    AutoDraftLength,
    DraftLengthPolicy,
    FixedDraftLength,
    StepCosts,
)
from vllm_emssd.integration.costs import StepCostMeter
from vllm_emssd.integration.cpu.row_padding import PaddedRowsMixin, RowPadding
from vllm_emssd.integration.drafting import (
    block_updates,
    chosen_lengths,
    leave_out_adapters,
    max_draft_tokens,
)
from vllm_emssd.integration.failure_policy import FailurePolicy
from vllm_emssd.integration.hooks.hook import installed
from vllm_emssd.integration.kv_cache import (
    draft_group,
    remake_metadata_builders,
    specs_for_drafting,
)
from vllm_emssd.integration.metrics import Publisher
from vllm_emssd.integration.ranks import Ranks
from vllm_emssd.integration.request_options import RequestLimits, reference_of
from vllm_emssd.integration.runners import advise_v2, refuse_unprepared_v1
from vllm_emssd.integration.unsupported import ONLY_MIXED_CHOOSES
from vllm_emssd.integration.v1.automatic_lengths import measure_costs
from vllm_emssd.integration.v1.drafter import PagedDrafter
from vllm_emssd.integration.v1.eagle_drafter import EagleDrafter
from vllm_emssd.integration.v1.rejection_sampler import (
    UnpadRejectionSampler,
    UnpadSampler,
)
from vllm_emssd.integration.v1.sampling import LOGITSPROCS_HOOK, UnpadSamplingMixin
from vllm_emssd.integration.v1.thinking_budget import ThinkingBudgets
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch, Proposer, plugin_proposer
from vllm_emssd.proposers.copy_lengths import CopyLengths
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.eagle import EagleProposer
from vllm_emssd.proposers.hidden_states import HiddenStates
from vllm_emssd.proposers.llma import LlmaProposer
from vllm_emssd.proposers.mixed import MixedProposer
from vllm_emssd.verification import ScheduledStep, pad_to_longest


@contextmanager
def _stock_drafter_allowed(spec_config: SpeculativeConfig) -> Iterator[None]:
    """vLLM's draft-model object refuses to be made for an unpadded batch, which it
    cannot run. We make it for its weights and buffers and run the batch ourselves."""
    spec_config.disable_padded_drafter_batch = False
    try:
        yield
    finally:
        spec_config.disable_padded_drafter_batch = spec_config.uses_draft_kv_cache()


class UnpadRunnerMixin(UnpadSamplingMixin):
    """Owns the proposer, the draft cursor and the counters of one rank."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        refuse_unprepared_v1(vllm_config, device)
        advise_v2(vllm_config, device)
        spec_config = vllm_config.speculative_config
        with _stock_drafter_allowed(spec_config), installed([LOGITSPROCS_HOOK]):
            super().__init__(vllm_config, device)
        self.sampler = UnpadSampler(
            self.model_config.logprobs_mode, self.model_config.use_fp64_gumbel
        )
        self.rejection_sampler = UnpadRejectionSampler(
            self.sampler, spec_config, self.device
        )
        self.emssd_config = EmssdConfig.carried_by(vllm_config.additional_config)
        self.counters = Counters()
        self._ranks = Ranks(self.device)
        self._proposer: Proposer | None = None  # made with the KV cache
        self._cursor: DraftCursor | None = None  # of the draft model, if any
        self.paged_drafter: PagedDrafter | None = None
        self._hidden_states: HiddenStates | None = None  # for an EAGLE head, if any
        self.step_costs: StepCostMeter | None = None  # with automatic lengths
        self._row_padding: RowPadding | None = None  # likewise
        self._automatic: AutoDraftLength | None = None  # likewise
        self._request_limits = RequestLimits()
        # Of requests that have some: proposed, filler not counted.
        self.num_real_drafts: dict[str, int] = {}
        self._publisher = Publisher(self.counters, vllm_config)
        self._failures = FailurePolicy(self.counters, self.parallel_config)

    # ------------------------------------------------------------ start-up

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.speculative_config.method == "eagle3":
            leave_out_adapters(self.drafter.model)
            # What the head shared with the target in place of its own frees a kernel's
            # handle, which while a model is traced fills the log with an error.
            gc.collect()

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs = super().get_kv_cache_spec()
        return specs_for_drafting(specs, self.emssd_config.uses_draft_model)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        if self.emssd_config.uses_draft_model:  # before vLLM asserts it
            draft_group(kv_cache_config, self.drafter._draft_attn_layer_names)
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self.vllm_config.reasoning_config is not None:
            self.input_batch.thinking_budget_state_holder = ThinkingBudgets(
                self.vllm_config, self.device
            )
        if self.emssd_config.uses_draft_model:
            self._make_drafter(kv_cache_config)
        self._proposer = self._make_proposer(FixedDraftLength())

    def _make_proposer(
        self, policy: DraftLengthPolicy, costs: StepCosts | None = None
    ) -> Proposer:
        """`policy`: of a draft model; `costs`: with automatic lengths."""
        config = self.emssd_config
        check = None if self._ranks.is_alone else self._ranks.check_agreement
        lengths = CopyLengths(costs, check)
        if (make := plugin_proposer(config.proposer)) is not None:
            return make(config, lengths)
        copying = LlmaProposer(config.check_length, config.copy_length, lengths)
        if not config.uses_draft_model:
            return copying
        assert self.paged_drafter is not None
        assert self._cursor is not None
        feeds_every_prompt = self.vllm_config.kv_transfer_config is not None
        parts = (self.paged_drafter, self._cursor, policy, self.counters, check)
        if self._hidden_states is None:
            drafting = DraftModelProposer(*parts, feeds_every_prompt)
        else:
            drafting = EagleProposer(
                *parts,
                feeds_every_prompt,
                states=self._hidden_states,
                block_size=self.drafter.block_size,
            )
        if not config.copies:
            return drafting
        most = config.num_speculative_tokens
        return MixedProposer(copying, drafting, most, weighs_copies=costs is not None)

    def _make_drafter(self, kv_cache_config: KVCacheConfig) -> None:
        remake_metadata_builders(self.drafter, self.vllm_config, self.device)
        group = kv_cache_config.kv_cache_groups[self.drafter.kv_cache_gid]
        self._cursor = DraftCursor(
            kv_cache_config.num_blocks,
            group.kv_cache_spec.block_size,
            trust_cached_blocks=self.vllm_config.kv_transfer_config is None,
        )
        parts = (
            self.drafter,
            self.vllm_config,
            self.input_batch,
            self.requests,
            min(self.effective_drafter_max_model_len, self.max_model_len),
        )
        if self.speculative_config.uses_draft_model():
            self.paged_drafter = PagedDrafter(*parts)
            return
        self._hidden_states = HiddenStates(
            kv_cache_config.num_blocks,
            group.kv_cache_spec.block_size,
            self.max_num_tokens,
        )
        self.paged_drafter = EagleDrafter(
            *parts, states=self._hidden_states, cursor=self._cursor
        )

    def start_automatic_lengths(self) -> None:
        """Measure costs and draft by them from now on: after warm-up, once."""
        if self.emssd_config.draft_length != "auto":
            return
        self.step_costs, self._row_padding = measure_costs(
            self, self.paged_drafter, self.computed_rows, self._ranks
        )
        is_sampled = self.speculative_config.draft_sample_method == "probabilistic"
        costs = self.step_costs.costs
        most = self.num_spec_tokens
        self._automatic = AutoDraftLength(costs, most, may_trim=not is_sampled)
        self._proposer = self._make_proposer(self._automatic, costs)

    # ------------------------------------------------------------ calls of the worker

    def fix_draft_length(self, num_draft_tokens: int | None) -> None:
        """See the worker's `emssd_fix_draft_length`."""
        proposer = self._proposer
        is_alone = isinstance(proposer, DraftModelProposer)
        automatic = self._automatic if is_alone else None
        policy = chosen_lengths(num_draft_tokens, automatic, self.num_spec_tokens)
        assert isinstance(proposer, DraftModelProposer)
        proposer.policy = policy

    def use_proposer(self, proposer: str | None) -> None:
        """See the worker's `emssd_use_proposer`."""
        if not isinstance(self._proposer, MixedProposer):
            raise ValueError(ONLY_MIXED_CHOOSES)
        self._proposer.use(proposer)

    # ------------------------------------------------------------ a step

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        if self._proposer is not None:
            self._proposer.release(scheduler_output.finished_req_ids)
        for req_id in scheduler_output.finished_req_ids:
            self.num_real_drafts.pop(req_id, None)
            if self.paged_drafter is not None:
                self.paged_drafter.draft_probs.pop(req_id, None)
        if self._cursor is not None:
            updates = block_updates(scheduler_output, self.drafter.kv_cache_gid)
            fresh = self._cursor.update_blocks(*updates)
            if self._hidden_states is not None:
                self._hidden_states.forget(fresh)
        self._has_drafts = bool(scheduler_output.scheduled_spec_decode_tokens)
        self._request_limits.release(scheduler_output.finished_req_ids)
        self._request_limits.admit(scheduler_output.scheduled_new_reqs)
        self._admit_references(scheduler_output)
        return super()._update_states(scheduler_output)

    def _admit_references(self, scheduler_output: SchedulerOutput) -> None:
        if not isinstance(self._proposer, LlmaProposer | MixedProposer):
            return
        vocab_size = self.model_config.get_vocab_size()
        for new in scheduler_output.scheduled_new_reqs:
            reference = reference_of(new.sampling_params, vocab_size)
            if reference is not None:
                self._proposer.add_reference(new.req_id, reference)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Stock stops drafting for all once one request is too long; we cap each."""
        return True

    def propose_draft_token_ids(  # type: ignore[override]
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        sampling_metadata: SamplingMetadata,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        assert self._proposer is not None
        step = self._record_verified(scheduler_output, sampled_token_ids)
        if self._hidden_states is not None:
            table = self.input_batch.block_table[self.drafter.kv_cache_gid]
            slots = table.slot_mapping.gpu
            self._hidden_states.keep(
                aux_hidden_states or [hidden_states],
                slots[: scheduler_output.total_num_scheduled_tokens],
            )
        # Where drafts have not paid for long, most steps end here.
        num_sampling = int(step.is_sampling.sum())
        skips = isinstance(
            self._proposer, DraftModelProposer
        ) and self._proposer.skips_step(num_sampling)
        if skips:
            drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        else:
            drafts = self._propose(step)
        self._publisher.step_done()
        if self.step_costs is not None:
            has_verified = bool(scheduler_output.scheduled_spec_decode_tokens)
            self.step_costs.step_done(num_sampling, not skips or has_verified)
        return drafts

    def _propose(self, step: ScheduledStep) -> list[list[int]]:
        assert self._proposer is not None
        batch = self._draft_batch(step)
        try:
            drafts = self._proposer.propose(batch)
        except Exception as error:
            self._failures.take(error)
            drafts = [[] for _ in batch.req_ids]
            # The proposer hears that none of those it may have made were verified.
            self.num_real_drafts.update(dict.fromkeys(batch.req_ids, 0))
        each = zip(batch.req_ids, drafts, strict=True)
        self.num_real_drafts.update((req_id, len(d)) for req_id, d in each if d)
        if not self.emssd_config.unpad_inputs:
            last = batch.token_ids[np.arange(batch.num_reqs), batch.num_tokens - 1]
            drafts = pad_to_longest(drafts, batch.is_sampling.tolist(), last.tolist())
        return drafts

    def _record_verified(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: list[list[int]]
    ) -> ScheduledStep:
        """Move the cursors by what was accepted, and count the step."""
        num_sampled = np.fromiter(map(len, sampled_token_ids), np.int64)
        step = self._scheduled_step(scheduler_output, num_sampled > 0)
        num_real = step.num_draft_tokens - step.num_forbidden
        for req_id in list(self.num_real_drafts):
            i = self.input_batch.req_id_to_index.get(req_id)
            if i is None or not step.is_sampling[i]:
                continue  # left out of the step: its drafts stay pending
            del self.num_real_drafts[req_id]
            if self.paged_drafter is not None:
                self.paged_drafter.draft_probs.pop(req_id, None)  # used up
            self._tell_proposer(req_id, int(num_real[i]), int(num_sampled[i]) - 1)
        step.count(
            num_sampled,
            self.emssd_config.num_speculative_tokens,
            self.counters,
            has_draft_model=self._cursor is not None,
            has_head=self._hidden_states is not None,
        )
        return step

    def _scheduled_step(
        self, scheduler_output: SchedulerOutput, is_sampling: np.ndarray
    ) -> ScheduledStep:
        req_ids = self.input_batch.req_ids
        num_reqs = len(req_ids)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        num_rows, num_real = np.zeros((2, num_reqs), dtype=np.int64)
        if drafts:
            num_rows[:] = [len(drafts.get(req_id, ())) for req_id in req_ids]
            num_real[:] = [self.num_real_drafts.get(req_id, 0) for req_id in req_ids]
        scheduled = scheduler_output.num_scheduled_tokens
        num_computed = self.input_batch.num_computed_tokens_cpu[:num_reqs]
        return ScheduledStep(
            req_ids=req_ids,
            num_scheduled_tokens=np.fromiter(
                (scheduled[req_id] for req_id in req_ids), np.int64, num_reqs
            ),
            num_draft_tokens=num_rows,
            is_decode=num_computed >= self.input_batch.num_prompt_tokens[:num_reqs],
            is_sampling=is_sampling,
            num_forbidden=np.maximum(num_rows - num_real, 0),
        )

    def _tell_proposer(self, req_id: str, num_drafts: int, num_accepted: int) -> None:
        assert self._proposer is not None
        try:
            self._proposer.record_verified(req_id, num_drafts, num_accepted)
        except Exception as error:
            self._failures.take(error)
            if self._cursor is not None:
                # Whether it moved or not: these drafts must not count later.
                self._cursor.record_fed_drafts(req_id, 0)

    def _draft_batch(self, step: ScheduledStep) -> DraftBatch:
        input_batch, num_reqs = self.input_batch, len(step.req_ids)
        num_tokens = input_batch.num_tokens_no_spec[:num_reqs].astype(np.int64)
        num_computed = input_batch.num_computed_tokens_cpu[:num_reqs]
        return DraftBatch(
            req_ids=step.req_ids,
            token_ids=input_batch.token_ids_cpu,
            num_tokens=num_tokens,
            num_prompt_tokens=input_batch.num_prompt_tokens[:num_reqs].astype(np.int64),
            num_scheduled_tokens=step.num_scheduled_tokens,
            num_prefilled_tokens=num_computed + step.num_scheduled_tokens,
            is_sampling=step.is_sampling,
            max_draft_tokens=self._max_draft_tokens(num_tokens),
        )

    def _max_draft_tokens(self, num_tokens: np.ndarray) -> np.ndarray:
        """Most drafts of each request. [num_reqs] int64"""
        limits = self._max_num_tokens(len(num_tokens))
        drafter = None if self.emssd_config.copies else self.paged_drafter
        most = max_draft_tokens(
            num_tokens,
            self.num_spec_tokens,
            self.max_model_len,
            None if drafter is None else drafter.max_model_len,
            limits if self.emssd_config.draft_length == "auto" else None,
        )
        most[num_tokens >= limits] = 0  # this step was their last
        most[self._requests_of_custom_logitsprocs()] = 0
        self._request_limits.apply(most, self.input_batch.req_ids)
        return most

    def _max_num_tokens(self, num_reqs: int) -> np.ndarray:
        """Tokens of each request once it has emitted `max_tokens`. [num_reqs] int64"""
        limits = np.array(
            [
                self.requests[req_id].sampling_params.max_tokens
                for req_id in self.input_batch.req_ids
            ],
            dtype=np.int64,
        )
        return self.input_batch.num_prompt_tokens[:num_reqs] + limits


class UnpadCPUModelRunner(PaddedRowsMixin, UnpadRunnerMixin, CPUModelRunner):
    pass


class UnpadGPUModelRunner(UnpadRunnerMixin, GPUModelRunner):
    pass
