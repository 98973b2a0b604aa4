"""What our speculators with a drafter have in common, whatever is fed to it.

A step records what is to be verified, plans how many drafts each request makes and what
the drafter lacks before, has the forwards run, and settles when its acceptance arrives
with the step's output.

With the proposer `mixed` a request either copies or drafts, as on the V1 runner. The
host has to know which: one that copies is not fed to the drafter, and what it lacks is
fed when it drafts again. So the choice goes by the copies that the host knows of, which
with asynchronous scheduling are those of the step before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.async_draft_cursor import AsyncDraftCursor, UnverifiedStep
from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_length import Copies, DraftLengthPolicy
from vllm_emssd.draft_length.policy import StepInfo
from vllm_emssd.feeding import plan_feeding
from vllm_emssd.integration.drafting import block_updates, max_draft_tokens
from vllm_emssd.integration.kv_cache import draft_group
from vllm_emssd.integration.v2.kernels import set_one_hot_draft_logits
from vllm_emssd.integration.v2.pending_steps import (
    AsyncHostCopy,
    PendingStep,
    scheduled_step,
)
from vllm_emssd.integration.v2.ragged_speculator import RaggedSpeculator
from vllm_emssd.proposers.mixed import DRAFT_MODEL, LLMA, ModelDrafts
from vllm_emssd.verification import ScheduledStep


@dataclass(slots=True)
class PendingDrafts(PendingStep):
    unverified: UnverifiedStep
    is_copied: np.ndarray  # bool: its drafts are copies
    num_rejected: AsyncHostCopy | None  # where the device leaves some drafts out


class DraftingSpeculator(RaggedSpeculator, DraftModelSpeculator):
    """Owns the draft cursor and the policy of one rank."""

    num_first_rows: int  # of those a request lacks, that its first draft feeds
    drafter: Any  # its forwards, made with the KV cache: `TimedByClock`
    skips_dummy_drafting = False  # while costs of the target are measured
    _new_cursor: Callable[..., AsyncDraftCursor] = AsyncDraftCursor

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, *, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device)
        config = EmssdConfig.carried_by(vllm_config.additional_config)
        self.is_automatic = config.draft_length == "auto"
        self.policy = DraftLengthPolicy()
        self._feeds_every_prompt = vllm_config.kv_transfer_config is not None
        # By slot: whether drafts are greedy whatever is asked, and whether those to be
        # verified are copies.
        self._is_greedy, self._is_copied = np.zeros((2, self.max_num_reqs), bool)
        self._max_drafts = config.num_speculative_tokens  # of the model
        self._model_drafts = ModelDrafts()
        self.only: str | None = None  # as `MixedProposer` has it
        if config.copies:
            # vLLM has the texts in the host's memory unless its own n-grams are looked
            # up.
            texts = req_states.all_token_ids.gpu
            req_states.all_token_ids = StagedWriteTensor(
                texts.shape, dtype=texts.dtype, device=device
            )
        self._begin(vllm_config, req_states)

    # ------------------------------------------------------------ start-up

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if "max_model_len" in vars(self):  # vLLM 0.32 set it before the fit
            self.max_model_len = self._req_states.max_model_len
            self.draft_max_seq_len = self.max_model_len
        super().set_attn(model_state, kv_cache_config, *args, **kwargs)
        self._gid = gid = draft_group(kv_cache_config, self.draft_attn_layer_names)
        self._block_size = kv_cache_config.kv_cache_groups[gid].kv_cache_spec.block_size
        self._cursor = self._new_cursor(
            self.max_num_reqs,
            kv_cache_config.num_blocks,
            self._block_size,
            self.block_tables.block_tables[gid].gpu.shape[1],
            trust_cached_blocks=not self._feeds_every_prompt,
        )

    def dummy_forward(self, num_reqs: int, dummy_run: Callable[..., Any]) -> None:
        """Drafts of no request, as costly as those of so many, or a dummy run that
        makes some, where the drafter depends on the target."""
        raise NotImplementedError

    def forget_warm_up(self) -> None:
        super().forget_warm_up()
        self._model_drafts = ModelDrafts()

    # ------------------------------------------------------------ before a step

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().update_requests(scheduler_output)
        slot_of = self._req_states.req_id_to_index
        admitted, extended = block_updates(scheduler_output, self._gid)
        slots = [slot_of[request.req_id] for request in admitted]
        num_tokens = self._req_states.prefill_len.np[slots].tolist()
        self._cursor.update_blocks(
            zip(slots, num_tokens, admitted, strict=True),
            ((slot_of[req_id], block_ids) for req_id, block_ids in extended),
        )
        for new in scheduler_output.scheduled_new_reqs:
            # A grammar cuts drafts by their value, and only greedy ones may be. With a
            # seed a draft is accepted where the target samples it: the likeliest is
            # most often.
            params = new.sampling_params
            is_seeded = params is not None and params.seed is not None
            is_greedy = is_seeded or new.req_id in self._constrained
            self._is_greedy[slot_of[new.req_id]] = is_greedy

    def release(self, req_ids: Collection[str]) -> None:
        super().release(req_ids)
        for req_id in req_ids:
            self.policy.release(req_id)

    # ------------------------------------------------------------ a step

    def propose(
        self,
        input_batch: InputBatch,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not dummy_run:
            return self._propose(input_batch, *args)
        if self.skips_dummy_drafting:
            return self.draft_tokens[: input_batch.num_reqs]
        # For profiling stock's rows, the most there can be.
        kwargs |= {"dummy_run": True}
        return super().propose(input_batch, *args, **kwargs)  # type: ignore[safe-super]

    @torch.inference_mode()
    def _propose(
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
    ) -> torch.Tensor:
        """What the step verifies is noted, drafts are planned, and made."""
        step, unverified, was_copied = self._note_verified(input_batch, num_rejected)
        slots, copies = input_batch.idx_mapping_np, None
        drafts = self.draft_tokens[: len(slots)]
        if self._source is not None:
            drafts, copies = self._source.find(
                input_batch, step, num_sampled, was_copied
            )
            if self.only == DRAFT_MODEL:
                copies.rows[:] = 0
        num_made = np.zeros_like(slots)
        try:
            if self.only != LLMA:
                num_made = self._plan(input_batch, step, copies)
            if num_made.any():
                self._set_sampling(input_batch, temperature, seeds)
                drafts = self._drafts_beside(drafts, input_batch, num_made)
            if copies is not None:
                is_copied = (num_made == 0) & (copies.rows > 0)
                self._is_copied[slots] = is_copied
                num_made = np.where(is_copied, copies.rows, num_made)
            self._set_one_hot_draft_logits(input_batch, drafts, num_made)
        except Exception as error:
            self._failures.take(error)
            num_made = np.zeros_like(slots)
        self._cursor.end(unverified)
        self._note_made(step.req_ids, slots, num_made)
        return drafts

    def _note_verified(
        self, input_batch: InputBatch, num_rejected: torch.Tensor
    ) -> tuple[ScheduledStep, UnverifiedStep, np.ndarray]:
        """What is verified, to be settled once it is known what was accepted. And of
        which requests it was copied, [num_reqs] bool."""
        step = scheduled_step(input_batch, self._req_states, self.num_grammar_valid)
        slots = input_batch.idx_mapping_np
        verified = np.minimum(step.num_draft_tokens, self._num_made[slots])
        unverified = self._cursor.begin(slots, step.is_sampling, verified)
        was_copied = self._is_copied[slots]
        # Of drafts that were trimmed on the device, how many were not accepted.
        trims = self.enable_adaptive_verification and step.num_draft_tokens.any()
        rejected = AsyncHostCopy(num_rejected) if trims else None
        self._begin_step(input_batch, step, unverified)
        self._pending_steps.append(
            PendingDrafts(
                step, self._admission_ids[slots], unverified, was_copied, rejected
            )
        )
        return step, unverified, was_copied

    def _begin_step(
        self, input_batch: InputBatch, step: ScheduledStep, unverified: UnverifiedStep
    ) -> None:
        """Note what the drafter needs to know."""

    def _set_sampling(
        self, input_batch: InputBatch, temperature: torch.Tensor, seeds: torch.Tensor
    ) -> None:
        """Of drafts. Arguments: [max_num_reqs], by request state."""
        self.temperature.copy_(temperature)
        self.seeds.copy_(seeds)
        greedy = np.flatnonzero(self._is_greedy[input_batch.idx_mapping_np])
        if self.draft_logits is not None and len(greedy):
            self.temperature[self._rows_of(input_batch.idx_mapping, greedy)] = 0.0

    def _drafts_beside(
        self, others: torch.Tensor, input_batch: InputBatch, lens: np.ndarray
    ) -> torch.Tensor:
        """Make the drafts, beside those of requests that make none. [num_reqs, K] int64
        on the device; those not made are any tokens."""
        drafts = self._draft(input_batch, lens)
        if lens.all():
            return drafts
        rows = async_tensor_h2d(np.flatnonzero(lens), device=self.device)
        columns = others.clone()
        columns[rows] = drafts
        return columns

    def _set_one_hot_draft_logits(
        self, input_batch: InputBatch, drafts: torch.Tensor, num_made: np.ndarray
    ) -> None:
        """Copies, and what was drafted greedily, were not sampled from the drafter's
        distribution."""
        slots = input_batch.idx_mapping_np
        is_one_hot = self._is_copied[slots] | self._is_greedy[slots]
        one_hot = np.flatnonzero(is_one_hot & (num_made > 0))
        if self.draft_logits is not None and len(one_hot):
            rows = async_tensor_h2d(one_hot, device=self.device)
            states, most = input_batch.idx_mapping, int(num_made[one_hot].max())
            set_one_hot_draft_logits(self.draft_logits, rows, states, drafts, most)

    def _settle(self, pending: PendingStep, num_accepted: np.ndarray) -> None:
        """Move the cursors, and learn what is accepted."""
        assert isinstance(pending, PendingDrafts)
        unverified, step = pending.unverified, pending.step
        is_running = self._admission_ids[unverified.slots] == pending.admission_ids
        self._cursor.record_acceptance(unverified, num_accepted, is_running)
        # Under a grammar more are scheduled than were made: they say nothing.
        num_possible = step.num_possible_drafts
        is_seen = step.is_sampling & pending.is_wanted & ~pending.is_copied
        is_seen &= num_possible > 0
        if not is_seen.any():
            return
        try:
            if self.is_automatic:
                num_seen = np.where(is_seen, num_possible, 0)
                self.policy.observe_step(num_seen, num_accepted)
            if self._source is not None:
                seen = num_possible[is_seen], num_accepted[is_seen]
                self._model_drafts.observe_step(*seen)
        except Exception as error:
            self._failures.take(error)

    def _as_verified(
        self, pending: PendingStep, num_accepted: np.ndarray
    ) -> ScheduledStep:
        assert isinstance(pending, PendingDrafts)
        step, rejected = pending.step, pending.num_rejected
        if rejected is None:
            return step
        num_verified = np.where(step.is_sampling, num_accepted + rejected.wait(), 0)
        num_forbidden = np.maximum(num_verified - step.num_possible_drafts, 0)
        return replace(step, num_draft_tokens=num_verified, num_forbidden=num_forbidden)

    # ------------------------------------------------------------ what to feed

    def _plan(
        self, input_batch: InputBatch, step: ScheduledStep, copies: Copies | None
    ) -> np.ndarray:
        """How many drafts each request makes, after what else it lacks was fed.
        [num_reqs] int64"""
        slots, is_sampling = input_batch.idx_mapping_np, step.is_sampling
        if not self._feeds_every_prompt and self.policy.skips_step(
            int(is_sampling.sum())
        ):
            return np.zeros_like(slots)
        num_prefilled = input_batch.num_computed_tokens_np + step.num_scheduled_tokens
        prefill_len = input_batch.prefill_len_np
        # The host counts drafts as accepted until it learns of them.
        longest = np.where(is_sampling, num_prefilled + 1, prefill_len)
        most = max_draft_tokens(
            longest,
            self._max_drafts,
            self.max_model_len,
            self.drafter.max_model_len,
            self._req_states.max_seq_len[slots] if self.is_automatic else None,
        )
        self._request_limits.apply(most, step.req_ids)
        num_uncached_tokens = self._cursor.num_uncached_tokens(slots)
        not_computed = np.where(is_sampling, 0, prefill_len - num_prefilled)
        missing = np.maximum(num_uncached_tokens - not_computed, 0)
        missing = self._missing_before(slots, missing, most)
        may_draft = np.where(is_sampling, most, 0)
        if copies is not None and not self.is_automatic:  # else the policy weighs them
            may_draft[self._model_drafts.lose_to(copies, may_draft, missing)] = 0
        prompt_rows = None
        if self._feeds_every_prompt:
            room = self.drafter.max_model_len - (longest - num_uncached_tokens)
            prompt_rows = np.minimum(missing - is_sampling, room)
            prompt_rows = np.where(step.is_decode, 0, prompt_rows)
        num_rows, lens = plan_feeding(
            StepInfo(
                step.req_ids,
                is_sampling,
                may_draft,
                missing,
                int(step.num_scheduled_tokens[~is_sampling].sum()),
                copies,
            ),
            self.policy,
            most > 0,
            partial(self._cursor.waits_for_another, slots),
            self.drafter.max_num_rows,
            self.num_first_rows,
            prompt_rows,
        )
        if num_rows.any():
            self._backfill(input_batch, num_rows, num_uncached_tokens, longest)
        drafting = np.flatnonzero(lens)
        lens[drafting[self.drafter.max_num_reqs :]] = 0
        return lens

    def _missing_before(
        self, slots: np.ndarray, missing: np.ndarray, most: np.ndarray
    ) -> np.ndarray:
        """Rows to feed before a request drafts, of those `missing`. Where it must not
        draft yet, `most` becomes 0. [num_reqs] each"""
        return missing

    def _backfill(
        self,
        input_batch: InputBatch,
        num_rows: np.ndarray,
        num_uncached_tokens: np.ndarray,
        longest: np.ndarray,
    ) -> None:
        """Feed the first `num_rows` that each request lacks. [num_reqs] each"""
        raise NotImplementedError

    def _draft(self, input_batch: InputBatch, lens: np.ndarray) -> torch.Tensor:
        """Make so many drafts of each request. Of those that make any, [num_drafting,
        K] int64 on the device; those not made are any tokens."""
        raise NotImplementedError

    def _count_forward(
        self,
        slots: np.ndarray,
        ends: np.ndarray,
        lens: np.ndarray,
        num_rows: int | None = None,
    ) -> None:
        """A forward of `lens` rows of each request, up to positions `ends`, or of
        `num_rows` where the device left drafts out."""
        num_rows = int(lens.sum()) if num_rows is None else num_rows
        past_prompt = ends - self._req_states.prompt_len.np[slots]
        num_prompt = int((lens - np.clip(past_prompt, 0, lens)).sum())
        self.counters.count_draft_forward(num_rows, num_rows - num_prompt)

    def _count_next_forwards(self, num_forwards: int, num_reqs: int) -> None:
        for _ in range(num_forwards):
            self.counters.count_draft_forward(num_reqs, num_reqs)

    def _rows_of(self, tensor: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Some rows, in their order."""
        if len(rows) == len(tensor):
            return tensor
        return tensor[async_tensor_h2d(rows, device=self.device)]
