"""vLLM's V1 model runner with unpadded drafting after each step.

The runner keeps all it does; this class listens to the scheduler's block
allocations, replaces the proposal of drafts, and counts. `UnpadRunnerMixin` goes in
front of vLLM's CPU and GPU runner classes alike.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    AdapterLogitsProcessor,
    LogitsProcessors,
)
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_emssd.config import ADDITIONAL_CONFIG_KEY, EmssdConfig
from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor
from vllm_emssd.draft_length import FixedDraftLength
from vllm_emssd.integration import hooks
from vllm_emssd.integration.paged_drafter import PagedDrafter
from vllm_emssd.integration.prometheus import open_shared_counters
from vllm_emssd.integration.rejection_sampler import UnpadRejectionSampler
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch, Proposer
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.llma import LlmaProposer
from vllm_emssd.scorer import VerifiedRows, pad_to_longest

logger = init_logger("vllm.emssd.runner")


def _make_logitsprocs_hook(
    stock: Callable[..., LogitsProcessors],
) -> Callable[..., LogitsProcessors]:
    def build_logitsprocs(
        vllm_config: VllmConfig, *args: Any, **kwargs: Any
    ) -> LogitsProcessors:
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        return stock(plain, *args, **kwargs)

    return build_logitsprocs


LOGITSPROCS_HOOK = hooks.Hook(
    target="vllm.v1.worker.gpu_model_runner:build_logitsprocs",
    why="with speculation, stock leaves out min_p, logit_bias and custom processors",
    signature=(
        "vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs"
    ),
    upstream="logits processors in the V1 rejection sampler",
    remove_when="stock builds all processors with speculation on",
    make=_make_logitsprocs_hook,
)


@contextmanager
def _stock_drafter_allowed(spec_config: SpeculativeConfig) -> Iterator[None]:
    """vLLM's draft-model object refuses to be made for an unpadded batch, which it
    cannot run. We make it for its weights and buffers and run the batch ourselves."""
    saved = spec_config.disable_padded_drafter_batch
    spec_config.disable_padded_drafter_batch = False
    try:
        yield
    finally:
        spec_config.disable_padded_drafter_batch = saved


class UnpadRunnerMixin(GPUModelRunner):
    """Owns the proposer, the draft cursor and the counters of one rank."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        spec_config = vllm_config.speculative_config
        with _stock_drafter_allowed(spec_config), hooks.installed([LOGITSPROCS_HOOK]):
            super().__init__(vllm_config, device)
        self.rejection_sampler = UnpadRejectionSampler(
            self.sampler, spec_config, self.device
        )
        options = vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]
        self.emssd_config = EmssdConfig(**options)
        self.counters = Counters()
        self._proposer: Proposer | None = None  # made with the KV cache
        self._cursor: DraftCursor | None = None  # of the draft model, if any
        self._paged_drafter: PagedDrafter | None = None
        self._num_real_drafts: dict[str, int] = {}  # proposed, filler not counted
        is_publisher = self.parallel_config.rank == 0
        self._shared_counters = (
            open_shared_counters(self.parallel_config.data_parallel_index)
            if is_publisher
            else None
        )

    # ------------------------------------------------------------ start-up

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        config, policy = self.emssd_config, FixedDraftLength()
        if config.proposer == "llma":
            self._proposer = LlmaProposer(
                config.check_length, config.copy_length, policy
            )
            return
        group = kv_cache_config.kv_cache_groups[self.drafter.kv_cache_gid]
        self._cursor = DraftCursor(
            kv_cache_config.num_blocks,
            group.kv_cache_spec.block_size,
            trust_cached_blocks=self.vllm_config.kv_transfer_config is None,
        )
        self._paged_drafter = PagedDrafter(
            self.drafter,
            self.vllm_config,
            self.input_batch,
            min(self.effective_drafter_max_model_len, self.max_model_len),
        )
        self._proposer = DraftModelProposer(
            self._paged_drafter, self._cursor, policy, self.counters
        )

    # ------------------------------------------------------------ a step

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        if self._proposer is not None:
            self._proposer.release(scheduler_output.finished_req_ids)
        for req_id in scheduler_output.finished_req_ids:
            self._num_real_drafts.pop(req_id, None)
            if self._paged_drafter is not None:
                self._paged_drafter.draft_probs.pop(req_id, None)
        if self._cursor is not None:
            self._take_in_blocks(self._cursor, scheduler_output)
        return super()._update_states(scheduler_output)

    def _take_in_blocks(
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

    def _sample(
        self,
        logits: torch.Tensor | None,
        spec_decode_metadata: SpecDecodeMetadata | None,
    ) -> SamplerOutput:
        sampling_metadata = self.input_batch.sampling_metadata
        if spec_decode_metadata is not None and not self.emssd_config.unpad_inputs:
            spec_decode_metadata = self._without_filler(spec_decode_metadata)
        # A generator must not advance for a request whose prompt is not yet computed.
        saved = {
            i: generator.get_state() for i, generator in self._discarded_generators()
        }
        output = super()._sample(logits, spec_decode_metadata)
        for i, state in saved.items():
            self.input_batch.generators[i].set_state(state)
        self.input_batch.sampling_metadata = sampling_metadata
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        # Stock would move those generators back by their offset, which CPU
        # generators lack (RuntimeError); `_sample` restored their state already.
        hidden = dict(self._discarded_generators())
        for i in hidden:
            del self.input_batch.generators[i]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)

    def _discarded_generators(self) -> list[tuple[int, torch.Generator]]:
        generators = self.input_batch.generators
        if not generators:
            return []
        discarded = self.discard_request_mask.np
        return [(i, generators[i]) for i in generators if discarded[i]]

    def _without_filler(self, metadata: SpecDecodeMetadata) -> SpecDecodeMetadata:
        """The same metadata, comparing real drafts only. The sampling metadata lists
        drafts too, for penalties and bad words: it is replaced alike."""
        real = [self._num_real_drafts.get(r, 0) for r in self.input_batch.req_ids]
        rows = VerifiedRows.without_filler(
            np.asarray(metadata.num_draft_tokens), np.asarray(real)
        )
        device = metadata.draft_token_ids.device
        cu_num_draft_tokens = np.cumsum(rows.num_draft_tokens, dtype=np.int32)
        sampling_metadata = self.input_batch.sampling_metadata
        if sampling_metadata.spec_token_ids:
            self.input_batch.sampling_metadata = dataclasses.replace(
                sampling_metadata,
                spec_token_ids=[
                    tokens[:num_drafts]
                    for tokens, num_drafts in zip(
                        sampling_metadata.spec_token_ids,
                        rows.num_draft_tokens.tolist(),
                        strict=False,
                    )
                ],
            )
        return dataclasses.replace(
            metadata,
            draft_token_ids=metadata.draft_token_ids[
                torch.from_numpy(rows.draft_indices).to(device)
            ],
            num_draft_tokens=rows.num_draft_tokens.tolist(),
            cu_num_draft_tokens=torch.from_numpy(cu_num_draft_tokens).to(device),
            target_logits_indices=torch.from_numpy(rows.target_rows).to(device),
            bonus_logits_indices=torch.from_numpy(rows.bonus_rows).to(device),
        )

    def _get_spec_decode_draft_probs(
        self, spec_decode_metadata: SpecDecodeMetadata
    ) -> torch.Tensor | None:
        """Distributions of all drafts, [num_draft_tokens, vocab_size] float32, or None
        where all are one-hot. Stock drops all of them when one request has none."""
        if self._paged_drafter is None or not self._paged_drafter.draft_probs:
            return None
        probs = self._paged_drafter.draft_probs
        vocab_size = self.input_batch.vocab_size
        one_hot = torch.nn.functional.one_hot(
            spec_decode_metadata.draft_token_ids.long(), vocab_size
        ).float()
        first = 0
        for req_id, num_drafts in zip(
            self.input_batch.req_ids, spec_decode_metadata.num_draft_tokens, strict=True
        ):
            kept = probs.get(req_id)
            if kept and num_drafts:
                one_hot[first : first + num_drafts] = torch.stack(kept[:num_drafts])
            first += num_drafts
        return one_hot

    def propose_draft_token_ids(  # type: ignore[override]
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        assert self._proposer is not None
        self._record_verified(scheduler_output, sampled_token_ids)
        batch = self._draft_batch(scheduler_output, sampled_token_ids)
        drafts = self._proposer.propose(batch)
        self._num_real_drafts.update(zip(batch.req_ids, map(len, drafts), strict=True))
        if not self.emssd_config.unpad_inputs:
            last = batch.token_ids[np.arange(batch.num_reqs), batch.num_tokens - 1]
            drafts = pad_to_longest(drafts, batch.is_sampling.tolist(), last.tolist())
        if self._shared_counters is not None:
            self._shared_counters.publish(self.counters)
        return drafts

    def _record_verified(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: list[list[int]]
    ) -> None:
        """Move the cursors by what was accepted, and count the step."""
        counters, num_spec_tokens = self.counters, self.num_spec_tokens
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
            num_drafts = min(num_rows, self._num_real_drafts.get(req_id, 0))
            num_accepted = num_sampled - 1
            if self._cursor is not None:
                self._cursor.record_verified(req_id, num_accepted)
            num_verifying += is_decode
            longest = max(longest, num_rows)
            counters.num_request_steps += 1
            counters.num_draft_tokens += num_drafts
            counters.num_accepted_tokens += num_accepted
            counters.num_verify_rows += 1 + num_rows
            counters.num_padded_verify_rows += 1
            counters.num_emitted_tokens += num_sampled
        counters.num_padded_verify_rows += num_verifying * longest

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
        if self._paged_drafter is not None:
            room = np.minimum(room, self._paged_drafter.max_model_len - num_tokens + 1)
        most = np.clip(room, 0, self.num_spec_tokens)
        most[self._requests_of_custom_logitsprocs()] = 0
        return most

    def _requests_of_custom_logitsprocs(self) -> list[int]:
        """Batch rows whose logits a user's processor may change. It sees one row a
        request, so they cannot be verified several rows at a time: they get no drafts.
        """
        rows: set[int] = set()
        for processor in self.input_batch.logitsprocs.all:
            if isinstance(processor, tuple(BUILTIN_LOGITS_PROCESSORS)):
                continue
            if not isinstance(processor, AdapterLogitsProcessor):
                return list(range(self.input_batch.num_reqs))
            rows.update(processor.req_info)
        return sorted(rows)


class UnpadCPUModelRunner(UnpadRunnerMixin, CPUModelRunner):
    pass


class UnpadGPUModelRunner(UnpadRunnerMixin, GPUModelRunner):
    pass
