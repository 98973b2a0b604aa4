"""What our speculators with a drafter have in common, whatever is fed to it.

A step records what is to be verified, plans how many drafts each request makes and what
the drafter lacks before, has the forwards run, and settles when its acceptance arrives
with the step's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.async_draft_cursor import AsyncDraftCursor, Turn
from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_length import Copies, DraftLengthPolicy, FixedDraftLength
from vllm_emssd.draft_length.policy import StepInfo
from vllm_emssd.feeding import plan_feeding
from vllm_emssd.integration.drafting import block_updates, max_draft_tokens
from vllm_emssd.integration.kv_cache import draft_group
from vllm_emssd.integration.v2.copy_source import FoundCopies
from vllm_emssd.integration.v2.pending_steps import LateArray, scheduled_step
from vllm_emssd.integration.v2.ragged_speculator import RaggedSpeculator
from vllm_emssd.verification import ScheduledStep


class _Left(NamedTuple):
    """Of a step, to be settled when its acceptance is known."""

    turn: Turn
    is_copied: np.ndarray  # [num_reqs] bool: its drafts are copies
    num_rejected: LateArray | None  # where the device leaves some drafts out
    numbers: np.ndarray  # [num_reqs] int64: of the admissions


class DraftingSpeculator(RaggedSpeculator, DraftModelSpeculator):
    """Owns the draft cursor and the policy of one rank."""

    num_first_rows: int  # of those a request lacks, that its first draft feeds
    _drafter: Any  # the forwards, made with the KV cache
    _new_cursor: Callable[..., AsyncDraftCursor] = AsyncDraftCursor

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
        self._sits_out_dummy_runs = False
        self.policy: DraftLengthPolicy = FixedDraftLength()
        self._feeds_every_prompt = vllm_config.kv_transfer_config is not None
        # By slot: whether drafts are greedy whatever is asked, and whether those to be
        # verified are copies.
        self._is_greedy, self._is_copied = np.zeros((2, self.max_num_reqs), bool)
        self._most_drafts = config.num_speculative_tokens  # of the model
        self._begin(vllm_config, req_states)

    # ------------------------------------------------------------ start-up

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().set_attn(model_state, kv_cache_config, *args, **kwargs)
        self._gid = gid = draft_group(kv_cache_config, self.draft_attn_layer_names)
        self._cursor = self._new_cursor(
            self.max_num_reqs,
            kv_cache_config.num_blocks,
            kv_cache_config.kv_cache_groups[gid].kv_cache_spec.block_size,
            self.block_tables.block_tables[gid].gpu.shape[1],
            trust_cached_blocks=not self._feeds_every_prompt,
        )

    @property
    def drafter(self) -> Any:
        """Its forwards: see `costs.TimedDraftForwards`."""
        return self._drafter

    @contextmanager
    def sitting_out_dummy_runs(self) -> Iterator[None]:
        """While costs of the target are measured."""
        self._sits_out_dummy_runs = True
        try:
            yield
        finally:
            self._sits_out_dummy_runs = False

    def rehearse(self, num_reqs: int, dummy_run: Callable[..., Any]) -> None:
        """Drafts of no request, as costly as those of so many, or a dummy run that
        makes some, where the drafter depends on the target."""
        raise NotImplementedError

    def computed_rows(self, num_reqs: int) -> int:
        """Of a draft forward with a row of each request, padding included."""
        return num_reqs

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

    def release(self, req_ids: Iterable[str]) -> None:
        req_ids = list(req_ids)
        super().release(req_ids)
        for req_id in req_ids:
            self.policy.release(req_id)

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
        is_profile: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if dummy_run and self._sits_out_dummy_runs:
            return self.draft_tokens[: input_batch.num_reqs]
        if dummy_run:  # profiling: stock's rows, the most there can be
            return super().propose(  # type: ignore[safe-super]
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
                is_profile=is_profile,
                **kwargs,
            )
        step = scheduled_step(input_batch, self._req_states, self.num_grammar_valid)
        slots = input_batch.idx_mapping_np
        verified = np.minimum(step.num_draft_tokens, self._num_made[slots])
        turn = self._cursor.begin(slots, step.is_sampling, verified)
        # Of drafts that were trimmed on the device, how many were not accepted.
        trims = self.enable_adaptive_verification and step.num_draft_tokens.any()
        rejected = LateArray(num_rejected) if trims else None
        numbers = self._numbers[slots]
        self._begin_step(input_batch, step, turn)
        left = _Left(turn, self._is_copied[slots], rejected, numbers)
        self._pending_steps.add(step, numbers, left)
        found = self._find_copies(input_batch, step, num_sampled)
        copies = None if found is None else found.copies
        drafts = self.draft_tokens[: len(slots)] if found is None else found.token_ids
        num_made = np.zeros_like(slots)
        try:
            lens = self._plan(input_batch, step, turn, copies)
            if lens.any():
                self.temperature.copy_(temperature)
                self.seeds.copy_(seeds)
                drafts = self._draft(input_batch, lens, drafts)
                num_made = lens
            if copies is not None:
                num_made = self._add_copies(input_batch, drafts, num_made, copies)
        except Exception as error:
            self._failures.take(error)
        self._cursor.end(turn)
        self._note_made(step.req_ids, slots, num_made)
        return drafts

    def _begin_step(
        self, input_batch: InputBatch, step: ScheduledStep, turn: Turn
    ) -> None:
        """Note what the drafter needs to know."""

    def _find_copies(
        self, input_batch: InputBatch, step: ScheduledStep, num_sampled: torch.Tensor
    ) -> FoundCopies | None:
        """None where nothing copies."""
        return None

    def _add_copies(
        self,
        input_batch: InputBatch,
        drafts: torch.Tensor,
        num_made: np.ndarray,
        copies: Copies,
    ) -> np.ndarray:
        """Requests without drafts of the model have their copies. [num_reqs] int64 all
        drafts."""
        raise NotImplementedError

    def _as_verified(
        self, step: ScheduledStep, left: _Left, num_accepted: np.ndarray
    ) -> ScheduledStep:
        rejected = left.num_rejected
        if rejected is None:
            return step
        num_possible = step.num_draft_tokens - step.num_forbidden
        num_verified = np.where(step.is_sampling, num_accepted + rejected.wait(), 0)
        return replace(
            step,
            num_draft_tokens=num_verified,
            num_forbidden=np.maximum(num_verified - num_possible, 0),
        )

    def _settle(
        self,
        step: ScheduledStep,
        left: _Left,
        num_accepted: np.ndarray,
        is_wanted: np.ndarray,
    ) -> None:
        """Move the cursors, and learn what is accepted."""
        turn, was_copied, _, numbers = left
        self._cursor.settle(turn, num_accepted, self._numbers[turn.slots] == numbers)
        # Under a grammar more are scheduled than were made: they say nothing.
        num_possible = step.num_draft_tokens - step.num_forbidden
        is_seen = step.is_sampling & is_wanted & (num_possible > 0) & ~was_copied
        if is_seen.any():
            try:
                num_verified = np.where(is_seen, num_possible, 0)
                self._learn_acceptance(num_verified, num_accepted)
            except Exception as error:
                self._failures.take(error)

    def _learn_acceptance(
        self, num_verified: np.ndarray, num_accepted: np.ndarray
    ) -> None:
        """Of the model's drafts. Both [num_reqs]; what verified none does not count."""
        if self.is_automatic:
            self.policy.observe_step(num_verified, num_accepted)

    # ------------------------------------------------------------ what to feed

    def _plan(
        self,
        input_batch: InputBatch,
        step: ScheduledStep,
        turn: Turn,
        copies: Copies | None,
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
            self._most_drafts,
            self.max_model_len,
            self._drafter.max_model_len,
            self._req_states.max_seq_len[slots] if self.is_automatic else None,
        )
        self._request_limits.apply(most, step.req_ids)
        num_lacking = self._cursor.num_lacking(slots)
        not_computed = np.where(is_sampling, 0, prefill_len - num_prefilled)
        missing = np.maximum(num_lacking - not_computed, 0)
        missing = self._missing_before(slots, missing, most)
        prompt_rows = None
        if self._feeds_every_prompt:
            room = self._drafter.max_model_len - (longest - num_lacking)
            prompt_rows = np.minimum(missing - is_sampling, room)
            prompt_rows = np.where(step.is_decode, 0, prompt_rows)
        num_rows, lens = plan_feeding(
            StepInfo(
                step.req_ids,
                is_sampling,
                self._may_draft(np.where(is_sampling, most, 0), missing, copies),
                missing,
                int(step.num_scheduled_tokens[~is_sampling].sum()),
                copies,
            ),
            self.policy,
            most > 0,
            partial(self._cursor.waits_for_another, slots),
            self._drafter.max_num_rows,
            self.num_first_rows,
            prompt_rows,
        )
        if num_rows.any():
            self._backfill(input_batch, num_rows, num_lacking, longest)
        drafting = np.flatnonzero(lens)
        lens[drafting[self._drafter.max_num_reqs :]] = 0
        return lens

    def _missing_before(
        self, slots: np.ndarray, missing: np.ndarray, most: np.ndarray
    ) -> np.ndarray:
        """Rows to feed before a request drafts, of those `missing`. Where it must not
        draft yet, `most` becomes 0. [num_reqs] each"""
        return missing

    def _may_draft(
        self, most: np.ndarray, missing: np.ndarray, copies: Copies | None
    ) -> np.ndarray:
        """Most drafts of the model, of those each request may make. [num_reqs] each"""
        return most

    def _backfill(
        self,
        input_batch: InputBatch,
        num_rows: np.ndarray,
        num_lacking: np.ndarray,
        longest: np.ndarray,
    ) -> None:
        """Feed the first `num_rows` that each request lacks. [num_reqs] each"""
        raise NotImplementedError

    def _draft(
        self, input_batch: InputBatch, lens: np.ndarray, others: torch.Tensor
    ) -> torch.Tensor:
        """Make the drafts. [num_reqs, K] int64 on the device; those not made are any
        tokens. `others`: the same, of requests that make none."""
        raise NotImplementedError

    def _rows_of(self, idx_mapping: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Request states of some batch rows, in their order."""
        if len(rows) == len(idx_mapping):
            return idx_mapping
        return idx_mapping[async_tensor_h2d(rows, device=self.device)]

    def _greedy_rows(
        self, idx_mapping: torch.Tensor, slots: np.ndarray
    ) -> torch.Tensor | None:
        """Those that draft greedily where others sample, whose temperature is set; None
        if there are none."""
        if self.draft_logits is None or not self._is_greedy[slots].any():
            return None
        rows = np.flatnonzero(self._is_greedy[slots])
        rows = async_tensor_h2d(rows, device=self.device)
        self.temperature[idx_mapping[rows]] = 0.0
        return rows
