"""The draft model over vLLM's paged blocks: one varlen forward of ragged rows.

Wraps the drafter object that vLLM's runner itself makes for a draft model (weights,
KV-cache layers, attention metadata builders and buffers are all vLLM's) and feeds it
the rows we choose instead of the padded ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import (
    ForwardContext,
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_emssd.draft_length import CostTable
from vllm_emssd.draft_length.cost import quickest_times
from vllm_emssd.integration.costs import CONTEXT, time_forwards
from vllm_emssd.integration.forward_clock import WallClock
from vllm_emssd.integration.v1.greedy import (
    greedy_tokens,
    greedy_tokens_and_confidence,
    highest_probability,
)
from vllm_emssd.ragged import RaggedRows


@dataclasses.dataclass(slots=True)
class _NextForwards:
    """What the forwards after a step's first need, made at once: each has one row of
    every request that drafts on, one position further than the forward before."""

    first: int  # draft position of the first of them
    req_indices: np.ndarray  # [num_reqs] int64: batch rows, rising
    positions: torch.Tensor  # [num_forwards, num_reqs] int64
    slots: torch.Tensor  # likewise
    seq_lens: torch.Tensor  # likewise, int32
    max_seq_len: int  # in the first
    metadata: CommonAttentionMetadata  # moved on in place

    def keep(self, req_indices: np.ndarray) -> None:
        """Only these requests, [num_left] int64, draft on."""
        kept = torch.from_numpy(np.searchsorted(self.req_indices, req_indices))
        self.req_indices = req_indices
        self.positions, self.slots, self.seq_lens = (
            of_each[:, kept] for of_each in (self.positions, self.slots, self.seq_lens)
        )
        self.max_seq_len = int(self.positions[0].max()) + 1
        metadata, num_reqs = self.metadata, len(kept)
        metadata.num_reqs = metadata.num_actual_tokens = num_reqs
        metadata.block_table_tensor = metadata.block_table_tensor[kept]
        metadata.query_start_loc = metadata.query_start_loc[: num_reqs + 1]
        metadata.query_start_loc_cpu = metadata.query_start_loc_cpu[: num_reqs + 1]


class PagedDrafter:
    """Implements `proposers.draft_model.Drafter`.

    Args:
        stock: vLLM's draft-model object, loaded and with its KV cache bound.
        input_batch: the runner's batch; its rows are the `req_indices` of a forward.
        requests: the runner's request states by id.
        max_model_len: positions that both models can take.
    """

    def __init__(
        self,
        stock: SpecDecodeBaseProposer,
        vllm_config: VllmConfig,
        input_batch: InputBatch,
        requests: Mapping[str, CachedRequestState],
        max_model_len: int,
    ) -> None:
        self.max_num_rows: int = stock.max_num_tokens
        self.max_num_reqs: int = input_batch.max_num_reqs
        self.max_model_len = max_model_len
        self.tells_confidence = False
        self._stock = stock
        self._vllm_config = vllm_config
        self._input_batch = input_batch
        self._requests = requests
        self._block_table = input_batch.block_table[stock.kv_cache_gid]
        # Request id -> distribution of each of its drafts, [vocab_size] float32 each.
        # Only of requests drafted by sampling; greedy drafts are one-hot.
        self.draft_probs: dict[str, list[torch.Tensor]] = {}
        self._clock = WallClock()  # its times are asked for on CPUs only
        self._context: ForwardContext | None = None  # that later forwards may have
        self._next_forwards: _NextForwards | None = None

    def take_timings(self) -> list[tuple[int, float]]:
        """(rows, ms) of the forwards since the last call."""
        return self._clock.take_timings()

    def measured_costs(self) -> tuple[CostTable, float]:
        """Of forwards without confidences; and the milliseconds that telling them takes
        more, in the median."""
        most = min(self.max_num_rows, self.max_num_reqs * self._rehearsed_context)
        times = []
        for self.tells_confidence in (True, False):
            samples = time_forwards(self._rehearse, self, most, self._stock.device)
            times.append(quickest_times(samples))
        told, bare = times
        more_ms = [told[n] - bare[n] for n in bare if n <= self.max_num_reqs]
        return CostTable(bare.keys(), bare.values()), max(float(np.median(more_ms)), 0)

    @property
    def _rehearsed_context(self) -> int:
        return min(CONTEXT, self.max_model_len)

    @torch.inference_mode()
    def _rehearse(self, num_rows: int) -> None:
        """One row a request, as all forwards but a step's first; beyond as many rows as
        there are requests, several rows each, as when prompts are fed."""
        num_reqs = min(num_rows, self.max_num_reqs)
        ends = np.full(num_reqs, self._rehearsed_context, dtype=np.int64)
        lens = np.diff(np.arange(num_reqs + 1) * num_rows // num_reqs)
        rows = RaggedRows.from_spans(np.arange(num_reqs), ends - lens, ends)
        token_ids = np.zeros(num_rows, dtype=np.int32)
        self.forward(rows, token_ids, rows.last_rows, 0)

    def forward(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        self._clock.start()
        drafted = self._forward(rows, token_ids, sampled_rows, draft_position)
        self._clock.stop(rows.num_rows)
        return drafted

    def _forward(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        hidden_states = self._run_model(rows, token_ids, draft_position)
        if len(sampled_rows) == 0:
            return torch.empty(0, dtype=torch.int64, device=hidden_states.device), None
        if len(sampled_rows) < len(hidden_states):
            index = async_tensor_h2d(sampled_rows, device=self._stock.device)
            hidden_states = hidden_states[index]
        req_indices = rows.row_req_indices[sampled_rows]
        tokens, probs, confidence = self._sample(hidden_states, req_indices)
        if probs is not None:
            self._keep_probs(req_indices, probs, draft_position)
        if confidence is None:
            return tokens, None
        return tokens, confidence.cpu().numpy()  # sync: decides which requests draft on

    def _sample(
        self, hidden_states: torch.Tensor, req_indices: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Drafts; their distributions, if any are drawn; confidences, if asked for."""
        stock, tells = self._stock, self.tells_confidence
        metadata = self._input_batch.sampling_metadata
        draws = stock._enable_probabilistic_draft_probs and not metadata.all_greedy
        if draws:
            metadata = self._draft_sampling_metadata(req_indices)
        if stock.use_local_argmax_reduction and not tells:
            return *stock._sample_draft_tokens(hidden_states, metadata), None
        if not draws:
            tokens, confidence = self._sample_greedily(hidden_states)
            return tokens, None, confidence
        logits = stock.model.compute_logits(hidden_states)
        confidence = highest_probability(logits) if tells else None
        return *stock._sample_from_logits(logits, metadata), confidence

    def _sample_greedily(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Likeliest tokens; their probabilities, if asked for."""
        return self._likeliest(self._stock.model.compute_logits(hidden_states))

    def _likeliest(
        self, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.tells_confidence:
            return greedy_tokens_and_confidence(logits)
        return greedy_tokens(logits), None

    def _draft_sampling_metadata(self, req_indices: np.ndarray) -> SamplingMetadata:
        """Temperatures of the requests in a forward. Under a grammar drafts are greedy:
        the grammar cuts them by their value, and only greedy ones may be. With a seed
        they are too: there a draft is accepted where the target samples it."""
        metadata = self._input_batch.sampling_metadata
        constrained = [self._drafts_greedily(i) for i in req_indices]
        index = async_tensor_h2d(req_indices, device=metadata.temperature.device)
        temperature = metadata.temperature[index]
        temperature[torch.tensor(constrained)] = 0.0
        return dataclasses.replace(
            metadata,
            temperature=temperature,
            all_random=metadata.all_random and not any(constrained),
        )

    def _drafts_greedily(self, req_index: int) -> bool:
        if req_index in self._input_batch.generators:
            return True
        request = self._requests[self._input_batch.req_ids[req_index]]
        params = request.sampling_params
        return params is not None and params.structured_outputs is not None

    def _run_model(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        draft_position: int,
    ) -> torch.Tensor:
        """Returns hidden states, [num_rows, hidden_size]."""
        stock, num_rows = self._stock, rows.num_rows
        if isinstance(token_ids, np.ndarray):
            token_ids = async_tensor_h2d(token_ids, device=stock.device)
        stock.input_ids[:num_rows] = token_ids
        if draft_position == 0 or self._context is None:
            return self._run_any(rows)[:num_rows]
        positions, context = self._next_forward(rows, draft_position, self._context)
        with context:
            return self._call_model(num_rows, positions)

    def _call_model(self, num_rows: int, positions: torch.Tensor) -> torch.Tensor:
        """On the rows in the buffers of vLLM's object. [num_rows, hidden_size]"""
        hidden_states: torch.Tensor = self._stock.model(
            input_ids=self._stock.input_ids[:num_rows],
            positions=positions,
            inputs_embeds=None,
        )
        return hidden_states

    def _run_any(self, rows: RaggedRows) -> torch.Tensor:
        """Any rows, padded to those of a CUDA graph if there is one."""
        stock, num_rows = self._stock, rows.num_rows
        stock.positions[:num_rows] = async_tensor_h2d(
            rows.positions, device=stock.device
        )
        attn_metadata = self._attention_metadata(rows)
        _, per_layer = stock.build_per_group_and_layer_attn_metadata(attn_metadata)
        mode, num_input_rows, across_dp = stock._determine_batch_execution_and_padding(
            num_rows
        )
        with set_forward_context(
            per_layer,
            self._vllm_config,
            num_tokens=num_input_rows,
            num_tokens_across_dp=across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=stock._get_slot_mapping(
                num_input_rows, attn_metadata.slot_mapping
            ),
        ):
            context = get_forward_context()
            hidden_states = self._call_model(
                num_input_rows, stock.positions[:num_input_rows]
            )
        self._next_forwards = None
        says_rows = mode != CUDAGraphMode.NONE or across_dp is not None
        says_rows = says_rows or context.dp_metadata is not None
        on_cpu = stock.device.type == "cpu"
        self._context = context if on_cpu and not says_rows else None
        return hidden_states

    def _next_forward(
        self, rows: RaggedRows, draft_position: int, context: ForwardContext
    ) -> tuple[torch.Tensor, AbstractContextManager[None]]:
        """Positions, [num_rows] int64, and the context to run the model in: that of the
        step's first forward, which on a CPU says nothing of its row count."""
        made = self._next_forwards
        if made is None:
            made = self._next_forwards = self._make_next_forwards(rows, draft_position)
        elif rows.num_reqs < len(made.req_indices):
            made.keep(rows.req_indices)
        ahead = draft_position - made.first
        metadata = made.metadata
        metadata.seq_lens = metadata.seq_lens_cpu_upper_bound = made.seq_lens[ahead]
        metadata.slot_mapping = made.slots[ahead]
        metadata.max_seq_len = made.max_seq_len + ahead
        _, per_layer = self._stock.build_per_group_and_layer_attn_metadata(metadata)
        context.attn_metadata = per_layer
        context.slot_mapping = dict.fromkeys(
            self._stock._draft_attn_layer_names, metadata.slot_mapping
        )
        context.moe_layer_index = 0
        return made.positions[ahead], override_forward_context(context)

    def _make_next_forwards(
        self, rows: RaggedRows, draft_position: int
    ) -> _NextForwards:
        num_forwards = self._stock.num_speculative_tokens - draft_position
        ahead = np.arange(max(num_forwards, 1))
        # Requests that stop earlier do not come to the last of them.
        positions = np.minimum(rows.positions + ahead[:, None], self.max_model_len - 1)
        all_rows = RaggedRows.one_each(
            np.tile(rows.req_indices, len(ahead)), positions.ravel()
        )
        device = self._stock.device
        positions, slots, seq_lens = (
            async_tensor_h2d(values, device=device).view(len(ahead), -1)
            for values in (
                positions,
                self.kv_slots(all_rows),
                self._seq_lens(all_rows),
            )
        )
        return _NextForwards(
            draft_position,
            rows.req_indices,
            positions,
            slots,
            seq_lens,
            int(rows.positions.max()) + 1,
            self._attention_metadata(rows),
        )

    def kv_slots(self, rows: RaggedRows) -> np.ndarray:
        return rows.slot_mapping(
            self._block_table.block_table.np, self._stock.block_size
        )

    def _seq_lens(self, rows: RaggedRows) -> np.ndarray:
        """Context of each request in the forward. [num_reqs] int32"""
        return rows.seq_lens

    def _block_tables(self, req_indices: np.ndarray) -> torch.Tensor:
        """Blocks of each request's context. [num_reqs, max_blocks_per_req]"""
        index = async_tensor_h2d(req_indices, device=self._stock.device)
        return self._block_table.block_table.gpu[index]

    def _attention_metadata(self, rows: RaggedRows) -> CommonAttentionMetadata:
        device = self._stock.device
        slots = self.kv_slots(rows)
        query_start_loc = torch.from_numpy(rows.query_start_loc)
        seq_lens_np = self._seq_lens(rows)
        seq_lens = torch.from_numpy(seq_lens_np)
        return CommonAttentionMetadata(
            query_start_loc=async_tensor_h2d(query_start_loc, device=device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=async_tensor_h2d(seq_lens, device=device),
            num_reqs=rows.num_reqs,
            num_actual_tokens=rows.num_rows,
            max_query_len=1 if rows.has_one_row_each else int(rows.query_lens.max()),
            max_seq_len=int(seq_lens_np.max()),
            block_table_tensor=self._block_tables(rows.req_indices),
            slot_mapping=async_tensor_h2d(slots, device=device),
            seq_lens_cpu_upper_bound=seq_lens,
        )

    def _keep_probs(
        self, req_indices: np.ndarray, probs: torch.Tensor, draft_position: int
    ) -> None:
        for i, distribution in zip(req_indices, probs, strict=True):
            if self._drafts_greedily(i):
                continue
            kept = self.draft_probs.setdefault(self._input_batch.req_ids[i], [])
            del kept[draft_position:]
            kept.append(distribution)
