"""vLLM's V1 model runner with unpadded drafting after each step.

The runner keeps all it does; this class listens to the scheduler's block
allocations, replaces the proposal of drafts, and counts. `UnpadRunnerMixin` goes in
front of vLLM's CPU and GPU runner classes alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor
from vllm_emssd.draft_length import DraftLengthPolicy, FixedDraftLength, StepCosts
from vllm_emssd.integration.cpu.row_padding import PaddedRowsMixin
from vllm_emssd.integration.failure_policy import FailurePolicy
from vllm_emssd.integration.hooks import hook as hooks
from vllm_emssd.integration.kv_cache import (
    draft_group,
    keep_windows_whole,
    refuse_states,
    remake_metadata_builders,
)
from vllm_emssd.integration.metrics.publisher import Publisher
from vllm_emssd.integration.ranks import Ranks
from vllm_emssd.integration.references import reference_of
from vllm_emssd.integration.request_limits import RequestLimits
from vllm_emssd.integration.unsupported import AUTO_NEEDS_V2, refuse_async_v1
from vllm_emssd.integration.v1.automatic_lengths import AutomaticLengthsMixin
from vllm_emssd.integration.v1.drafter import PagedDrafter
from vllm_emssd.integration.v1.rejection_sampler import (
    UnpadRejectionSampler,
    UnpadSampler,
)
from vllm_emssd.integration.v1.sampling import LOGITSPROCS_HOOK, UnpadSamplingMixin
from vllm_emssd.integration.v1.thinking_budget import ThinkingBudgets
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch, Proposer
from vllm_emssd.proposers.copier import Copier
from vllm_emssd.proposers.copy_lengths import CopyLengths
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.llma import LlmaProposer
from vllm_emssd.proposers.mixed import MixedProposer
from vllm_emssd.proposers.registry import plugin_proposer
from vllm_emssd.verification import pad_to_longest


@contextmanager
def _stock_drafter_allowed(spec_config: SpeculativeConfig) -> Iterator[None]:
    """vLLM's draft-model object refuses to be made for an unpadded batch, which it
    cannot run. We make it for its weights and buffers and run the batch ourselves."""
    spec_config.disable_padded_drafter_batch = False
    try:
        yield
    finally:
        spec_config.disable_padded_drafter_batch = spec_config.uses_draft_model()


class UnpadRunnerMixin(AutomaticLengthsMixin, UnpadSamplingMixin):
    """Owns the proposer, the draft cursor and the counters of one rank."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        refuse_async_v1(vllm_config)
        spec_config = vllm_config.speculative_config
        with _stock_drafter_allowed(spec_config), hooks.installed([LOGITSPROCS_HOOK]):
            super().__init__(vllm_config, device)
        self.sampler = UnpadSampler(
            self.model_config.logprobs_mode, self.model_config.use_fp64_gumbel
        )
        self.rejection_sampler = UnpadRejectionSampler(
            self.sampler, spec_config, self.device
        )
        self.emssd_config = EmssdConfig.of_worker(vllm_config.additional_config)
        self.counters = Counters()
        self._ranks = Ranks(self.device)
        self._proposer: Proposer | None = None  # made with the KV cache
        self._cursor: DraftCursor | None = None  # of the draft model, if any
        self.paged_drafter: PagedDrafter | None = None
        self._step_costs = None
        self._automatic = None
        self._request_limits = RequestLimits()
        self.num_real_drafts: dict[str, int] = {}  # proposed, filler not counted
        self._publisher = Publisher(self.counters, vllm_config)
        self._failures = FailurePolicy(self.counters, self.parallel_config)

    # ------------------------------------------------------------ start-up

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs = super().get_kv_cache_spec()
        refuse_states(specs)
        uses_draft_model = self.emssd_config.uses_draft_model
        return keep_windows_whole(specs) if uses_draft_model else specs

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
        copying = LlmaProposer(Copier(config.check_length), config.copy_length, lengths)
        if not config.uses_draft_model:
            return copying
        assert self.paged_drafter is not None
        assert self._cursor is not None
        drafting = DraftModelProposer(
            self.paged_drafter,
            self._cursor,
            policy,
            self.counters,
            check,
            feeds_every_prompt=self.vllm_config.kv_transfer_config is not None,
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
        self.paged_drafter = PagedDrafter(
            self.drafter,
            self.vllm_config,
            self.input_batch,
            self.requests,
            min(self.effective_drafter_max_model_len, self.max_model_len),
            is_timed=self.emssd_config.draft_length == "auto",
        )

    # ------------------------------------------------------------ a step

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        if self._proposer is not None:
            self._proposer.release(scheduler_output.finished_req_ids)
        for req_id in scheduler_output.finished_req_ids:
            self.num_real_drafts.pop(req_id, None)
            if self.paged_drafter is not None:
                self.paged_drafter.draft_probs.pop(req_id, None)
        if self._cursor is not None:
            self._update_blocks(self._cursor, scheduler_output)
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

    def _update_blocks(
        self, cursor: DraftCursor, scheduler_output: SchedulerOutput
    ) -> None:
        gid = self.drafter.kv_cache_gid
        admitted = [
            AdmittedRequest(new.req_id, new.block_ids[gid], new.num_computed_tokens)
            for new in scheduler_output.scheduled_new_reqs
        ]
        extended = []
        cached = scheduler_output.scheduled_cached_reqs
        for req_id, block_ids, num_computed_tokens in zip(
            cached.req_ids,
            cached.new_block_ids,
            cached.num_computed_tokens,
            strict=True,
        ):
            if block_ids is None:
                continue
            if req_id in cached.resumed_req_ids:
                admitted.append(
                    AdmittedRequest(req_id, block_ids[gid], num_computed_tokens)
                )
            else:
                extended.append((req_id, block_ids[gid]))
        cursor.update_blocks(admitted, extended)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Stock stops drafting for all once one request is too long; we cap each."""
        return True

    def propose_draft_token_ids(  # type: ignore[override]
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        assert self._proposer is not None
        self._record_verified(scheduler_output, sampled_token_ids)
        skips = self._skips_step(sampled_token_ids)
        if skips:
            drafts: list[list[int]] = [[] for _ in sampled_token_ids]
            self.num_real_drafts.update(dict.fromkeys(self.input_batch.req_ids, 0))
        else:
            drafts = self._propose(scheduler_output, sampled_token_ids)
        self._publisher.step_done()
        if self._step_costs is not None:
            has_verified = bool(scheduler_output.scheduled_spec_decode_tokens)
            self._step_costs.step_done(learns_costs=not skips or has_verified)
        return drafts

    def _skips_step(self, sampled_token_ids: list[list[int]]) -> bool:
        """Where drafts have not paid for long, most steps end here."""
        if not isinstance(self._proposer, DraftModelProposer):
            return False
        return self._proposer.skips_step(sum(map(bool, sampled_token_ids)))

    def _propose(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: list[list[int]]
    ) -> list[list[int]]:
        assert self._proposer is not None
        batch = self._draft_batch(scheduler_output, sampled_token_ids)
        try:
            drafts = self._proposer.propose(batch)
        except Exception as error:
            self._failures.take(error)
            drafts = [[] for _ in batch.req_ids]
        self.num_real_drafts.update(zip(batch.req_ids, map(len, drafts), strict=True))
        if not self.emssd_config.unpad_inputs:
            last = batch.token_ids[np.arange(batch.num_reqs), batch.num_tokens - 1]
            drafts = pad_to_longest(drafts, batch.is_sampling.tolist(), last.tolist())
        return drafts

    def _record_verified(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: list[list[int]]
    ) -> None:
        """Move the cursors by what was accepted, and count the step."""
        counters = self.counters
        num_spec_tokens = self.emssd_config.num_speculative_tokens
        scheduled_drafts = scheduler_output.scheduled_spec_decode_tokens
        has_draft_model = self._cursor is not None
        counters.num_steps += 1
        num_verifying, longest = 0, 0
        for i, req_id in enumerate(self.input_batch.req_ids):
            num_sampled = len(sampled_token_ids[i])
            num_scheduled = scheduler_output.num_scheduled_tokens[req_id]
            num_computed = int(self.input_batch.num_computed_tokens_cpu[i])
            is_decode = num_computed >= int(self.input_batch.num_prompt_tokens[i])
            if has_draft_model:
                verified = max(num_scheduled, 1 + num_spec_tokens)
                fed = (verified if is_decode else num_scheduled) + num_spec_tokens
                counters.num_padded_draft_rows += fed
                counters.num_padded_draft_rows_decode += (
                    fed if is_decode else num_spec_tokens
                )
            if not num_sampled:
                continue
            num_rows = len(scheduled_drafts.get(req_id, ()))
            num_drafts = min(num_rows, self.num_real_drafts.get(req_id, 0))
            num_accepted = num_sampled - 1
            if self.paged_drafter is not None:
                self.paged_drafter.draft_probs.pop(req_id, None)  # used up
            self._tell_proposer(req_id, num_drafts, num_accepted)
            num_verifying += is_decode
            longest = max(longest, num_rows)
            counters.num_request_steps += 1
            counters.num_draft_tokens += num_drafts
            counters.num_accepted_tokens += num_accepted
            counters.num_verify_rows += 1 + num_rows
            counters.num_padded_verify_rows += 1
            counters.num_emitted_tokens += num_sampled
        counters.num_padded_verify_rows += num_verifying * longest

    def _tell_proposer(self, req_id: str, num_drafts: int, num_accepted: int) -> None:
        assert self._proposer is not None
        try:
            self._proposer.record_verified(req_id, num_drafts, num_accepted)
        except Exception as error:
            self._failures.take(error)
            if self._cursor is not None:
                # Whether it moved or not: these drafts must not count later.
                self._cursor.record_fed_drafts(req_id, 0)

    def _draft_batch(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: list[list[int]]
    ) -> DraftBatch:
        input_batch = self.input_batch
        num_reqs = input_batch.num_reqs
        num_tokens = input_batch.num_tokens_no_spec[:num_reqs].astype(np.int64)
        scheduled = scheduler_output.num_scheduled_tokens
        num_scheduled = np.fromiter(
            (scheduled[r] for r in input_batch.req_ids), np.int64, num_reqs
        )
        return DraftBatch(
            req_ids=input_batch.req_ids,
            token_ids=input_batch.token_ids_cpu,
            num_tokens=num_tokens,
            num_prompt_tokens=input_batch.num_prompt_tokens[:num_reqs].astype(np.int64),
            num_scheduled_tokens=num_scheduled,
            num_prefilled_tokens=(
                input_batch.num_computed_tokens_cpu[:num_reqs] + num_scheduled
            ).astype(np.int64),
            is_sampling=np.fromiter(map(bool, sampled_token_ids), bool, num_reqs),
            max_draft_tokens=self._max_draft_tokens(num_tokens),
        )

    def _max_draft_tokens(self, num_tokens: np.ndarray) -> np.ndarray:
        """Most drafts of each request: K, what the model length leaves room for (one
        place stays for the token the target adds), and what the drafter can take."""
        room = self.max_model_len - num_tokens - 1
        if self.paged_drafter is not None and not self.emssd_config.copies:
            room = np.minimum(room, self.paged_drafter.max_model_len - num_tokens + 1)
        wanted = self._num_wanted_tokens(num_tokens)
        if self.emssd_config.draft_length == "auto":
            room = np.minimum(room, wanted - 1)
        most = np.clip(room, 0, self.num_spec_tokens)
        most[wanted <= 0] = 0  # this step was their last
        most[self._requests_of_custom_logitsprocs()] = 0
        self._request_limits.apply(most, self.input_batch.req_id_to_index)
        return most

    def _num_wanted_tokens(self, num_tokens: np.ndarray) -> np.ndarray:
        """Tokens each request still emits before `max_tokens`. [num_reqs] int64"""
        limits = np.array(
            [
                self.requests[req_id].sampling_params.max_tokens
                for req_id in self.input_batch.req_ids
            ],
            dtype=np.int64,
        )
        return self.input_batch.num_prompt_tokens[: len(limits)] + limits - num_tokens


class UnpadCPUModelRunner(PaddedRowsMixin, UnpadRunnerMixin, CPUModelRunner):
    pass


class UnpadGPUModelRunner(UnpadRunnerMixin, GPUModelRunner):
    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        config = EmssdConfig.of_worker(vllm_config.additional_config)
        if config.draft_length == "auto":  # this runner goes by the wall clock
            raise ValueError(AUTO_NEEDS_V2)
        super().__init__(vllm_config, device)
