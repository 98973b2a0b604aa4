"""The draft model over vLLM's paged blocks: one varlen forward of ragged rows.

Wraps the drafter object that vLLM's runner itself makes for a draft model (weights,
KV-cache layers, attention metadata builders and buffers are all vLLM's) and feeds it
the rows we choose instead of the padded ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_emssd.draft_length import CostTable
from vllm_emssd.draft_length.cost import quickest_times
from vllm_emssd.integration.costs import CONTEXT, time_forwards
from vllm_emssd.integration.forward_clock import TimedByClock, WallClock
from vllm_emssd.integration.v1.greedy import argmax_with_confidence
from vllm_emssd.ragged import RaggedRows


class PagedDrafter(TimedByClock):
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
        input_batch: InputBatch,
        requests: Mapping[str, CachedRequestState],
        max_model_len: int,
    ) -> None:
        self.max_num_rows: int = stock.max_num_tokens
        self.max_num_reqs: int = input_batch.max_num_reqs
        self.max_model_len = max_model_len
        self._stock = stock
        self._input_batch = input_batch
        self._requests = requests
        self._block_table = input_batch.block_table[stock.kv_cache_gid]
        # Request id -> distribution of each of its drafts, [vocab_size] float32 each.
        # Only of requests drafted by sampling; greedy drafts are one-hot.
        self.draft_probs: dict[str, list[torch.Tensor]] = {}

    def measured_costs(self) -> tuple[CostTable, float]:
        """Of forwards without confidences; and the milliseconds that telling them takes
        more, in the median."""
        self.clock = WallClock()  # automatic lengths run on V1 with CPUs only
        context = min(CONTEXT, self.max_model_len)
        most = min(self.max_num_rows, self.max_num_reqs * context)
        run = partial(self._dummy_forward, context)
        times = []
        for self.returns_confidence in (True, False):
            samples = time_forwards(run, self, most, self._stock.device)
            times.append(quickest_times(samples))
        told, bare = times
        more_ms = [told[n] - bare[n] for n in bare if n <= self.max_num_reqs]
        return CostTable(bare.keys(), bare.values()), max(float(np.median(more_ms)), 0)

    @torch.inference_mode()
    def _dummy_forward(self, context: int, num_rows: int) -> None:
        """One row a request, as all forwards but a step's first; beyond as many rows as
        there are requests, several rows each, as when prompts are fed."""
        num_reqs = min(num_rows, self.max_num_reqs)
        ends = np.full(num_reqs, context, dtype=np.int64)
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
        self.clock.start()
        drafted = self._forward(rows, token_ids, sampled_rows, draft_position)
        self.clock.stop(rows.num_rows)
        return drafted

    def _forward(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        hidden_states = self._run_model(rows, token_ids)
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
        stock, with_confidence = self._stock, self.returns_confidence
        metadata = self._input_batch.sampling_metadata
        draws = stock._enable_probabilistic_draft_probs and not metadata.all_greedy
        if draws:
            metadata = self._draft_sampling_metadata(req_indices)
        if stock.use_local_argmax_reduction and not with_confidence:
            return *stock._sample_draft_tokens(hidden_states, metadata), None
        if not draws:
            tokens, confidence = self._sample_greedily(hidden_states)
            return tokens, None, confidence
        logits, confidence = stock.model.compute_logits(hidden_states), None
        if with_confidence:
            _, confidence = argmax_with_confidence(
                logits.to(torch.float32, copy=True), with_confidence
            )
        return *stock._sample_from_logits(logits, metadata), confidence

    def _sample_greedily(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Likeliest tokens; their probabilities, if asked for."""
        logits = self._stock.model.compute_logits(hidden_states)
        return argmax_with_confidence(logits, self.returns_confidence)

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
        return request.sampling_params.structured_outputs is not None

    def _run_model(
        self, rows: RaggedRows, token_ids: np.ndarray | torch.Tensor
    ) -> torch.Tensor:
        """On rows padded to those of a CUDA graph if there is one. Returns hidden
        states, [num_rows, hidden_size]."""
        stock, num_rows = self._stock, rows.num_rows
        if isinstance(token_ids, np.ndarray):
            token_ids = async_tensor_h2d(token_ids, device=stock.device)
        stock.input_ids[:num_rows] = token_ids
        stock.positions[:num_rows] = async_tensor_h2d(
            rows.positions, device=stock.device
        )
        attn_metadata = self._attention_metadata(rows)
        _, per_layer = stock.build_per_group_and_layer_attn_metadata(attn_metadata)
        mode, num_input_rows, across_dp = stock._determine_batch_execution_and_padding(
            num_rows
        )
        slots = stock._get_slot_mapping(num_input_rows, attn_metadata.slot_mapping)
        with set_forward_context(
            per_layer,
            stock.vllm_config,
            num_tokens=num_input_rows,
            num_tokens_across_dp=across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=slots,
        ):
            return self._call_model(num_input_rows)[:num_rows]

    def _call_model(self, num_rows: int) -> torch.Tensor:
        """On the rows in the buffers of vLLM's object. [num_rows, hidden_size]"""
        return self._stock.model(
            input_ids=self._stock.input_ids[:num_rows],
            positions=self._stock.positions[:num_rows],
            inputs_embeds=None,
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
