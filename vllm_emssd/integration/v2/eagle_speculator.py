"""vLLM's EAGLE-3 speculator (V2 runner) that need not run its head in every step.

A step that drafts is vLLM's own: the target's rows with their hidden states, then one
row a request and draft, recorded as vLLM records them. In others the head is not run.
The target's hidden states of what it was not fed wait in a buffer, and are fed in a
pass of their own before the next draft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorBatchDescriptor,
)

from vllm_emssd.async_draft_cursor import UnverifiedStep
from vllm_emssd.async_head_cursor import AsyncHeadCursor
from vllm_emssd.feeding import grant_rows
from vllm_emssd.integration.costs import CONTEXT
from vllm_emssd.integration.drafting import leave_out_adapters, without_first_blocks
from vllm_emssd.integration.forward_clock import TimedByClock
from vllm_emssd.integration.v2.drafting_speculator import DraftingSpeculator
from vllm_emssd.proposers.hidden_states import MAX_BYTES
from vllm_emssd.verification import ScheduledStep


class KeptStates:
    """Hidden states by the slot of the KV cache that belongs to their token."""

    def __init__(self, buffer: torch.Tensor, num_kv_slots: int) -> None:
        self._states = buffer
        self._rows = torch.arange(len(buffer), device=buffer.device)
        # The last KV slot, one more, takes those of padding.
        self._row_of = self._rows.new_zeros(num_kv_slots + 1)

    def keep(self, states: torch.Tensor, kv_slots: torch.Tensor, start: int) -> None:
        """In the rows of the buffer from `start` on."""
        rows = slice(start, start + len(states))
        self._states[rows] = states
        self._row_of[kv_slots] = self._rows[rows]

    def of(self, kv_slots: torch.Tensor) -> torch.Tensor:
        return self._states[self._row_of[kv_slots]]


class UnpadEagleSpeculator(TimedByClock, DraftingSpeculator, EagleSpeculator):
    """Rows are counted as in `EagleProposer`: one at position p takes the token at
    p + 1, so that the last known token has none yet."""

    num_first_rows = 0  # a step's own rows do not count as lacking
    has_head = True
    _cursor: AsyncHeadCursor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drafter = self
        self.max_num_rows = self.max_num_tokens
        self._num_rows, self._depth = 0, self.num_speculative_steps  # of the step

    # ------------------------------------------------------------ start-up

    def load_model(self, target_model: nn.Module) -> None:
        super().load_model(target_model)
        leave_out_adapters(self.model)
        states = self.hidden_states
        row_bytes = states.shape[1] * states.element_size()
        # Four steps' tokens find room in any case.
        num_rows = max(MAX_BYTES // row_bytes, 4 * self.max_num_tokens)
        self._buffer = states.new_zeros(num_rows, states.shape[1])
        self._new_cursor = partial(AsyncHeadCursor, num_rows=num_rows)

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn(*args, **kwargs)
        self._layer = next(iter(self.draft_attn_layer_names))
        num_kv_slots = self.kv_cache_config.num_blocks * self._block_size
        self._kept = KeptStates(self._buffer, num_kv_slots)
        self._kv_slots = torch.zeros_like(self.block_tables.slot_mappings)

    def capture(self) -> None:
        """With automatic lengths graphs of each number of drafts; else of the most,
        where copies may be more."""
        graphs = self.decode_cudagraph_manager
        assert graphs is not None
        most = self._max_drafts
        depths = range(most, 1, -1) if self.is_automatic else [most]
        is_one = list(depths) == [self.num_speculative_steps]  # as vLLM records it
        if self.supports_decode_metadata_update and not is_one:
            graphs._capture_descs = {
                mode: [
                    SpeculatorBatchDescriptor(**vars(desc), num_speculative_tokens=k)
                    for desc in descs
                    for k in depths
                ]
                for mode, descs in graphs._capture_descs.items()
            }
        super().capture()

    # ------------------------------------------------------------ what forwards cost

    def computed_rows(self, num_reqs: int) -> int:
        """Of a draft forward with a row of each request."""
        return num_reqs

    def dummy_forward(self, num_reqs: int, dummy_run: Callable[..., Any]) -> None:
        dummy_run(num_reqs, context_len=CONTEXT)

    def on_prefill_begin(self, num_reqs: int) -> None:
        self.clock.start()

    on_multi_step_decode_begin = on_prefill_begin

    def on_prefill_end(self, num_reqs: int) -> None:
        self.clock.stop(self._num_rows)

    def on_multi_step_decode_end(self, num_reqs: int) -> None:
        self.clock.stop(num_reqs, self._depth - 1)

    # ------------------------------------------------------------ a step

    def _vacate(self, slot: int) -> None:
        super()._vacate(slot)
        self._cursor.vacate(slot)

    @torch.inference_mode()
    def propose(  # type: ignore[override]
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor],
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        states = self.model.combine_hidden_states(torch.cat(aux_hidden_states, dim=-1))
        self._num_rows, self._depth = input_batch.num_tokens, self.num_speculative_steps
        self._attn_metadata = attn_metadata
        if not dummy_run:
            self._kv_slots_now = slot_mappings[self._layer][: self._num_rows]
        inputs = slot_mappings, states, None
        sync = kwargs.get("dp_sync_state")
        self._inputs = *inputs, *args[:4], self.temperature, self.seeds, sync
        kwargs |= {"dummy_run": dummy_run}
        drafts = super().propose(input_batch, attn_metadata, *inputs, *args, **kwargs)
        if not dummy_run:
            self._keep(input_batch, states)
        return drafts

    def _begin_step(
        self, input_batch: InputBatch, step: ScheduledStep, unverified: UnverifiedStep
    ) -> None:
        num_prefilled = input_batch.num_computed_tokens_np + step.num_scheduled_tokens
        # Tokens at the end of the text that no row can take yet.
        self._num_later = np.where(
            step.is_sampling, 1, input_batch.prefill_len_np - num_prefilled
        )
        self._own_rows = (
            step.num_scheduled_tokens - step.num_draft_tokens + unverified.num_drafts
        )
        self._is_uncertain = self._cursor.awaits_drafts(unverified)
        self._may_feed = False  # unless the policy plans the step

    def _num_missing(self, slots: np.ndarray) -> np.ndarray:
        """Rows that each request lacks before those of the step. [num_reqs]"""
        lacking = self._cursor.num_uncached_tokens(slots) - self._num_later
        return np.maximum(lacking - self._own_rows, 0)

    def _cannot_be_fed(self, slots: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """[num_reqs] bool: it is not known yet how many of the drafts were accepted
        that were verified while the head was not run; or hidden states are not here."""
        has_states = self._cursor.has_states(slots)
        return (missing > 0) & (self._is_uncertain | ~has_states)

    def _plan(self, input_batch: InputBatch, step: ScheduledStep, *args: Any) -> Any:
        self._feed_oldest(input_batch)
        lens = super()._plan(input_batch, step, *args)
        feeds_prompts = self.policy.feeds_prompts and not step.is_sampling.all()
        if self._may_feed and feeds_prompts and not lens.any():
            self._run_head(input_batch, 0)
        return lens

    def _feed_oldest(self, input_batch: InputBatch) -> None:
        """What the buffer is about to lose, whether or not anything is drafted."""
        slots = input_batch.idx_mapping_np
        is_old = self._cursor.loses_states(slots, 2 * self.max_num_tokens)
        if not is_old.any():
            return
        missing = self._num_missing(slots)
        is_old &= ~self._cannot_be_fed(slots, missing)
        num_rows = grant_rows(np.where(is_old, missing, 0), self.max_num_rows)
        if num_rows.any():
            self._backfill(input_batch, num_rows)

    def _missing_before(
        self, slots: np.ndarray, missing: np.ndarray, most: np.ndarray
    ) -> np.ndarray:
        self._may_feed = True
        missing = self._num_missing(slots)
        on = (missing > 0) & (most > 0) & ~self._is_uncertain
        restarts = self._cursor.restart(slots[on], missing[on])
        self.counters.num_draft_restarts += restarts
        missing = self._num_missing(slots)
        cannot = self._cannot_be_fed(slots, missing)
        most[cannot] = 0
        return np.where(cannot, 0, missing)

    def _draft(self, input_batch: InputBatch, lens: np.ndarray) -> torch.Tensor:
        drafts = self._run_head(input_batch, int(lens.max()))
        return self._rows_of(drafts, np.flatnonzero(lens))

    def _run_head(self, input_batch: InputBatch, depth: int) -> torch.Tensor:
        """vLLM's own step. What a request lacks before its rows was fed, or its rows
        are computed in vain."""
        slots, self._depth = input_batch.idx_mapping_np, depth
        batch, metadata, is_eager = input_batch, self._attn_metadata, False
        if self._cursor.firsts[slots].any():
            batch, metadata = self._restarted(input_batch)
            # A full graph of any rows would read the target's lengths.
            mode = self.vllm_config.compilation_config.cudagraph_mode
            is_eager = mode.mixed_mode() == CUDAGraphMode.FULL
        if depth > 1:  # later passes write the slots of their rows in the same place
            self._kv_slots_now = self._kv_slots_now.clone()
        drafts = EagleSpeculator.propose(
            self,
            batch,
            metadata,
            *self._inputs,
            is_profile=is_eager,
            num_speculative_tokens=depth,
        )
        if not depth:
            drafts.zero_()  # vLLM's -1 is no token to verify under a grammar
        fed = self._num_missing(slots) == 0
        self._cursor.feed(slots[fed], self._own_rows[fed])
        lens = input_batch.num_scheduled_tokens
        ends = input_batch.num_computed_tokens_np + lens
        self._count_forward(slots, ends, lens, input_batch.num_tokens)
        self._count_next_forwards(depth - 1, len(slots))
        return drafts

    def _backfill(
        self, input_batch: InputBatch, num_rows: np.ndarray, *args: Any
    ) -> None:
        all_slots = input_batch.idx_mapping_np
        missing = self._num_missing(all_slots)
        fed = np.flatnonzero(num_rows)
        slots, lens, missing = all_slots[fed], num_rows[fed], missing[fed]
        num_computed = input_batch.num_computed_tokens_np[fed]
        starts = np.concatenate([[0], lens.cumsum()]).astype(np.int32)
        num_reqs, total = len(fed), int(starts[-1])
        within = np.arange(total) - np.repeat(starts[:-1] + missing, lens)
        rows = np.stack([np.repeat(fed, lens), within])
        requests, within = async_tensor_h2d(rows, device=self.device)
        first = input_batch.positions[input_batch.query_start_loc[requests]]
        positions, states = first + within, input_batch.idx_mapping[requests]
        buffers, tables = self.input_buffers, self.block_tables
        token_ids = self._req_states.all_token_ids.gpu
        buffers.input_ids[:total] = token_ids[states, positions + 1]
        buffers.positions[:total] = positions
        ends = async_tensor_h2d(starts, device=self.device)
        idx_mapping = self._rows_of(input_batch.idx_mapping, fed)
        kv_slots = tables.compute_slot_mappings(
            idx_mapping, ends, buffers.positions[:total], total, out=self._kv_slots
        )
        self.hidden_states[:total] = self._kept.of(kv_slots[self._gid])
        tables.gather_block_tables(idx_mapping, num_reqs)
        seq_lens, most = positions[ends[1:] - 1] + 1, num_computed - missing + lens
        metadata = self._own_metadata(
            slots, starts, ends, seq_lens, torch.from_numpy(most), kv_slots
        )
        by_layer = build_slot_mappings_by_layer(kv_slots, self.kv_cache_config)
        self.clock.start()
        self._run_model(total, metadata, by_layer, None)
        self.clock.stop(total)
        # The step's own pass goes by the tables of all its requests.
        num_padded = input_batch.num_reqs_after_padding
        tables.gather_block_tables(input_batch.idx_mapping, num_padded)
        self._cursor.feed_kept(slots, lens, lens == missing)
        self._count_forward(slots, most, lens)

    def _restarted(self, input_batch: InputBatch) -> tuple[InputBatch, Any]:
        """What vLLM's step goes by, where some texts begin late for the head."""
        num_reqs = input_batch.num_reqs
        metadata = self._own_metadata(
            input_batch.idx_mapping_np,
            input_batch.query_start_loc_np[: num_reqs + 1],
            input_batch.query_start_loc[: num_reqs + 1],
            input_batch.seq_lens[:num_reqs],
            input_batch.seq_lens_cpu_upper_bound[:num_reqs],
        )
        seq_lens = self.input_buffers.seq_lens[:num_reqs].clone()
        batch = replace(input_batch, seq_lens=seq_lens, decode_graph_eligible=False)
        return batch, metadata

    def _own_metadata(
        self,
        slots: np.ndarray,
        starts: np.ndarray,
        starts_on_device: torch.Tensor,
        seq_lens: torch.Tensor,
        longest: torch.Tensor,
        kv_slots: torch.Tensor | None = None,
    ) -> Any:
        """Of a pass, each text from where it begins for the head.

        Args:
            starts: [num_reqs + 1] first rows, and their end.
            seq_lens: [num_reqs] ends of the rows; `longest`, on the host: at most so.
            kv_slots: of the rows, if not those of the target.
        """
        buffers, num_reqs = self.input_buffers, len(slots)
        firsts = self._cursor.firsts[slots]
        if firsts.any():
            first = async_tensor_h2d(firsts, device=self.device)
            seq_lens = seq_lens - first
            table = self.block_tables.input_block_tables[self._gid]
            num_skipped = first // self._block_size
            table[:num_reqs] = without_first_blocks(table[:num_reqs], num_skipped)
        buffers.query_start_loc[: num_reqs + 1] = starts_on_device
        buffers.seq_lens[:num_reqs] = seq_lens
        self.draft_max_seq_len = self.max_model_len
        desc = BatchExecutionDescriptor(CUDAGraphMode.NONE, int(starts[-1]), num_reqs)
        return self._build_attn_metadata(
            num_reqs, desc, starts, longest, step=0, slot_mappings=kv_slots
        )

    def _keep(self, input_batch: InputBatch, states: torch.Tensor) -> None:
        """The step's hidden states, if any request was not fed."""
        slots, num_rows = input_batch.idx_mapping_np, input_batch.num_tokens
        lacks = self._cursor.num_uncached_tokens(slots) > self._num_later
        self._cursor.keep_nothing(slots[~lacks])
        if lacks.any():
            number = self._cursor.take_rows(num_rows)
            row = number % self._cursor.num_rows
            self._kept.keep(states[:num_rows], self._kv_slots_now, row)
            starts = input_batch.num_computed_tokens_np[lacks]
            lens = input_batch.num_scheduled_tokens[lacks]
            self._cursor.keep(slots[lacks], number, starts, lens)
