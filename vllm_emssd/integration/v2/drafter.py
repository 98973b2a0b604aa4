"""Forwards of the draft model whose input the device lays out by itself.

Launching the kernels of a small model takes longer than running them, so a decoding
step is a few replays of CUDA graphs, and nothing between them:

- *first*: the last two tokens of each request, drafted after the second. Of the drafts
  verified one at most was never fed, so two rows are enough for every acceptance; the
  device knows where the text ends.
- *next*: one row each, the draft just made. A forward leaves its drafts, and the input
  of the next one, where that finds them.

A graph holds all of a forward: slots, attention metadata, model, sampling, and going on
by a token. Without graphs the same is launched kernel by kernel. What requests lack
besides is fed before, in a pass of its own (`backfill`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.integration.forward_clock import TimedByClock
from vllm_emssd.integration.v2.kernels import advance_kernel, place_rows_kernel

FIRST_ROWS = 2  # of each request
_BLOCK_SIZE = 1024


class DeviceDrafter(TimedByClock):
    """Wraps the speculator object of vLLM's V2 runner, whose weights, KV-cache layers,
    buffers and attention builders it uses. The drafts of a step are in the first rows
    of its `draft_tokens`.

    Args:
        stock: an `UnpadSpeculator` with its KV cache bound (`set_attn` was called).
        max_model_len: positions that both models can take.
    """

    def __init__(
        self, stock: Any, req_states: RequestState, max_model_len: int
    ) -> None:
        self.max_num_rows: int = stock.max_num_tokens
        self.max_num_reqs: int = min(
            stock.max_num_reqs, self.max_num_rows // FIRST_ROWS
        )
        self.max_model_len = max_model_len
        self._stock = stock
        self._req_states = req_states
        self._num_reqs = torch.zeros((), dtype=torch.int64, device=stock.device)
        # [max_num_reqs] int64: of the rows drafted after last
        self._positions = torch.zeros_like(stock.idx_mapping)

    def capture(self) -> None:
        """Record CUDA graphs, if any are wanted."""
        stock = self._stock
        stock.idx_mapping.fill_(-1)
        self._num_reqs.zero_()
        for rows in (FIRST_ROWS, 1):
            graphs = stock.graphs_of(rows)
            if graphs is not None and graphs.needs_capture():
                graphs.capture(
                    self.captured_forward,
                    stock.model_state,
                    stock.input_buffers,
                    stock.block_tables,
                    stock.attn_groups,
                    stock.kv_cache_config,
                    progress_bar_desc=f"Capturing draft forwards ({rows} rows each)",
                )

    # ------------------------------------------------------------ a step

    @torch.inference_mode()
    def backfill(
        self,
        idx_mapping: torch.Tensor,
        num_rows: np.ndarray,
        num_uncached_tokens: np.ndarray,
        longest: np.ndarray,
    ) -> None:
        """Feed known tokens, nothing drafted after them.

        Args:
            idx_mapping: [num_reqs] int64 request states, on the device.
            num_rows: [num_reqs] to feed of each request, >= 1.
            num_uncached_tokens: [num_reqs] from the first of them to the text's end.
            longest: [num_reqs] at most that long each text is.
        """
        stock, buffers = self._stock, self._stock.input_buffers
        starts = np.concatenate([[0], num_rows.cumsum()]).astype(np.int32)
        num_reqs, total = len(num_rows), int(starts[-1])
        spans = np.concatenate([starts, num_uncached_tokens], dtype=np.int32)
        stock.block_tables.gather_block_tables(idx_mapping, num_reqs)
        self._place(idx_mapping, async_tensor_h2d(spans, device=stock.device), 0)
        desc = BatchExecutionDescriptor(CUDAGraphMode.NONE, total, num_reqs)
        positions = buffers.positions[:total]
        slots = stock.block_tables.compute_slot_mappings(
            idx_mapping, buffers.query_start_loc[: num_reqs + 1], positions, total
        )
        metadata = self._attn_metadata(desc, starts, longest)
        by_layer = build_slot_mappings_by_layer(slots, stock.kv_cache_config)
        self.clock.start()
        stock._run_model(buffers.input_ids[:total], positions, metadata, by_layer, None)
        self.clock.stop(total)

    @torch.inference_mode()
    def draft(self, idx_mapping: torch.Tensor, depth: int, longest: np.ndarray) -> None:
        """Make `depth` drafts of each request, of which no token is missing but the
        last two. Arguments as those of `backfill`."""
        num_reqs = len(idx_mapping)
        descs = [self._desc(num_reqs, rows) for rows in (FIRST_ROWS, 1)]
        num_padded = max(desc.num_reqs or num_reqs for desc in descs)
        tables = self._stock.block_tables
        tables.gather_block_tables(idx_mapping, num_padded)
        if any(desc.cg_mode == CUDAGraphMode.FULL for desc in descs):
            for group in (g for groups in self._stock.attn_groups for g in groups):
                group.map_to_kernel_block_table(
                    tables.input_block_tables[group.kv_cache_group_id]
                )
        self._place(idx_mapping, None, FIRST_ROWS, descs[0].num_tokens)
        for step in range(depth):
            self._forward(descs[step > 0], num_reqs, longest + step)

    @torch.inference_mode()
    def dummy_forward(self, num_reqs: int, context: int) -> None:
        """A next forward of no request, as costly as with that context of each."""
        buffers = self._stock.input_buffers
        self._stock.block_tables.get_dummy_block_tables(self._stock.max_num_reqs)
        self._stock.idx_mapping.fill_(-1)
        self._num_reqs.fill_(num_reqs)
        buffers.input_ids[:num_reqs] = 0
        buffers.positions[:num_reqs] = context - 1
        buffers.seq_lens.zero_()
        buffers.seq_lens[:num_reqs] = context
        buffers.query_start_loc[:] = self._stock.arange_gpu.clamp(max=num_reqs)
        self._stock.current_draft_step.zero_()
        longest = np.full(num_reqs, context)
        self._forward(self._desc(num_reqs, 1), num_reqs, longest)

    def _place(
        self,
        idx_mapping: torch.Tensor,
        spans: torch.Tensor | None,
        rows: int,
        num_rows_padded: int = 0,
    ) -> None:
        """Rows of the requests to the input buffers; see the kernel."""
        stock, buffers = self._stock, self._stock.input_buffers
        token_ids = self._req_states.all_token_ids.gpu
        num_reqs = len(idx_mapping)
        place_rows_kernel[(num_reqs + 1,)](
            idx_mapping,
            self._req_states.total_len.gpu,
            token_ids,
            token_ids.stride(0),
            spans,
            buffers.input_ids,
            buffers.positions,
            buffers.query_start_loc,
            buffers.seq_lens,
            stock.idx_mapping,
            stock.current_draft_step,
            self._num_reqs,
            num_reqs,
            num_rows_padded,
            stock.max_num_reqs,
            self.max_model_len - 1,
            ROWS=rows,
            BLOCK_SIZE=_BLOCK_SIZE,
        )

    # ------------------------------------------------------------ forwards

    def computed_rows(self, num_reqs: int) -> int:
        """Of a next forward."""
        return self._desc(num_reqs, 1).num_tokens

    def _desc(self, num_reqs: int, rows: int) -> BatchExecutionDescriptor:
        """How to run a forward of so many rows of each request."""
        graphs, num_rows = self._stock.graphs_of(rows), num_reqs * rows
        if graphs is None:
            return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_rows, num_reqs)
        return graphs.dispatch(
            num_reqs, num_rows, uniform_token_count=rows, num_active_loras=0
        )

    def _forward(
        self, desc: BatchExecutionDescriptor, num_reqs: int, longest: np.ndarray
    ) -> None:
        assert desc.num_reqs is not None
        rows = desc.num_tokens // desc.num_reqs
        self.clock.start()
        if desc.cg_mode == CUDAGraphMode.FULL:
            self._stock.graphs_of(rows).run_fullgraph(desc)
        else:
            self.launch(desc, num_reqs, longest)
        self.clock.stop(desc.num_tokens)

    def launch(
        self, desc: BatchExecutionDescriptor, num_reqs: int, longest: np.ndarray
    ) -> None:
        """A forward kernel by kernel."""
        stock, num_rows = self._stock, desc.num_tokens
        assert desc.num_reqs is not None
        starts = stock.arange_np[: num_reqs + 1] * (num_rows // desc.num_reqs)
        slot_mappings = build_slot_mappings_by_layer(
            stock.block_tables.slot_mappings[:, :num_rows], stock.kv_cache_config
        )
        metadata = self._attn_metadata(desc, starts, longest)
        self._run(desc.num_reqs, num_rows, metadata, slot_mappings)

    def captured_forward(
        self,
        num_reqs: int,
        num_rows: int,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """What a graph holds."""
        self._stock._update_draft_decode_metadata(attn_metadata, num_reqs)
        self._run(num_reqs, num_rows, attn_metadata, slot_mappings)

    def _run(
        self,
        num_reqs: int,
        num_rows: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor],
    ) -> None:
        """Of the rows in the input buffers, with padding. Leaves a draft after the last
        row of each request, and the input of a next forward."""
        stock, buffers = self._stock, self._stock.input_buffers
        idx_mapping = stock.idx_mapping[:num_reqs]
        starts = buffers.query_start_loc[: num_reqs + 1]
        positions = buffers.positions[:num_rows]
        stock.block_tables.compute_slot_mappings(
            idx_mapping, starts, positions, num_rows
        )
        hidden_states = stock._run_model(
            buffers.input_ids[:num_rows], positions, attn_metadata, slot_mappings, None
        )
        # Of padding the last row there is: its own may be anything, NaN among it.
        last_rows = (starts[1:] - 1).clamp(min=0)
        last_positions = self._positions[:num_reqs]
        last_positions.copy_(positions[last_rows])
        tokens = stock.sample_draft(
            hidden_states[last_rows],
            last_positions,
            idx_mapping,
            stock.temperature,
            stock.seeds,
            stock.current_draft_step,
            stock.draft_logits,
        )
        advance_kernel[(num_reqs + 1,)](
            tokens,
            last_positions,
            stock.draft_tokens,
            stock.draft_tokens.stride(0),
            stock.current_draft_step,
            self._num_reqs,
            buffers.input_ids,
            buffers.positions,
            buffers.query_start_loc,
            buffers.seq_lens,
            stock.idx_mapping,
            stock.max_num_reqs,
            self.max_model_len - 1,
            BLOCK_SIZE=_BLOCK_SIZE,
        )
        # Around, for while graphs are recorded nothing sets it back.
        stock.current_draft_step.add_(1).remainder_(stock.num_speculative_steps)

    def _attn_metadata(
        self, desc: BatchExecutionDescriptor, starts: np.ndarray, longest: np.ndarray
    ) -> dict[str, Any] | None:
        """`starts`: [num_reqs + 1] int32, each request's first row, and the end."""
        return self._stock._build_attn_metadata(
            num_reqs=len(longest),
            batch_desc=desc,
            query_start_loc_np=starts,
            seq_lens_cpu_upper_bound=torch.from_numpy(longest.astype(np.int32)),
            step=0,
        )
