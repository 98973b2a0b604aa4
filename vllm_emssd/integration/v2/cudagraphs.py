"""Draft forwards that are replayed from CUDA graphs.

Launching the kernels of a small model takes longer than running them. vLLM records the
forwards of speculators that read the target's states, but (in 0.32) not those of a
stand-alone draft model. Two kinds make up nearly all of a decoding batch's drafting:

- *first*: what each request lacks, 1 or 2 rows (the last accepted draft, if it was
  never fed, and the target's own token), drafted after the last one;
- *next*: one row each, of the same requests, after the draft just made.

A graph holds all of a forward: slots, attention metadata, model, sampling, and moving
on by a token in between. Without graphs *next* forwards are done here all the same,
kernel by kernel.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_emssd.ragged import RaggedRows

if TYPE_CHECKING:
    from vllm_emssd.integration.v2.speculator import UnpadSpeculator

MOST_FIRST_ROWS = 2  # of a request
NOBODY = -1  # a request state that vLLM's kernels leave alone


class DraftForwardGraphs:
    """Owns what a forward begins with and leaves, at addresses that stay.

    Args:
        stock: vLLM's speculator, with its KV cache bound (`set_attn` was called).
        max_model_len: positions that the draft model can take.
    """

    def __init__(self, stock: UnpadSpeculator, max_model_len: int) -> None:
        self._stock = stock
        self._last_position = max_model_len - 1
        num_reqs, device = stock.max_num_reqs, stock.device
        # [max_num_reqs] each, those beyond the batch are padding: tokens to feed next,
        # which a forward replaces by its drafts; request states; positions fed last
        self._token_ids = torch.zeros(num_reqs, dtype=torch.int64, device=device)
        self._idx_mapping = torch.full_like(self._token_ids, NOBODY)
        self._positions = torch.zeros_like(self._token_ids)
        self._confidence = torch.zeros(num_reqs, dtype=torch.float32, device=device)

    # ------------------------------------------------------------ start-up

    def capture(self) -> None:
        """Record the speculator's graphs, if any are wanted."""
        stock = self._stock
        self._idx_mapping.fill_(NOBODY)
        for name, graphs in (
            ("first", stock.first_graphs),
            ("next", stock.next_graphs),
        ):
            if graphs is not None and graphs.needs_capture():
                graphs.capture(
                    partial(self._record, name == "next"),
                    stock.model_state,
                    stock.input_buffers,
                    stock.block_tables,
                    stock.attn_groups,
                    stock.kv_cache_config,
                    progress_bar_desc=f"Capturing CUDA graphs of {name} draft forwards",
                )
        stock.confidence = None  # its memory is the graphs'

    def _record(
        self,
        is_next: bool,
        num_reqs: int,
        num_rows: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """What a graph holds. Metadata that cannot be brought up to date in a graph are
        built before it is replayed; for that, requests have moved on."""
        stock = self._stock
        if not is_next:
            positions = stock.input_buffers.positions[:num_rows]
            positions.clamp_(max=self._last_position)  # padding's are left from before
        if stock.supports_decode_metadata_update:
            if is_next:
                self._move_on(num_reqs)
            assert attn_metadata is not None
            stock._update_draft_decode_metadata(attn_metadata, num_reqs)
        self._forward(num_reqs, num_rows, attn_metadata, slot_mappings)

    # ------------------------------------------------------------ first forwards

    def has_first(self, rows: RaggedRows) -> bool:
        """Whether a graph fits."""
        return self._first_desc(rows).cg_mode == CUDAGraphMode.FULL

    def run_first(
        self,
        rows: RaggedRows,
        idx_mapping: torch.Tensor,
        draft_position: int,
        longest: np.ndarray,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that are in the speculator's input buffers, and their block tables
        gathered, as many as `num_reqs_padded`. Drafts after the last of each request.

        Args:
            idx_mapping: [num_reqs] int64 request states, on the device.
            longest: [num_reqs] int32, at most that long each request is then.

        Returns: [num_reqs] int64 draft token ids; positions drafted after.
        """
        num_reqs, graphs = rows.num_reqs, self._stock.first_graphs
        assert graphs is not None
        desc = self._first_desc(rows)
        self._set_requests(idx_mapping)
        self._stock.current_draft_step.fill_(draft_position)
        self._prepare_metadata(desc, rows.query_start_loc, longest)
        graphs.run_fullgraph(desc)
        return self._drafts(num_reqs), self._positions[:num_reqs]

    def _first_desc(self, rows: RaggedRows) -> BatchExecutionDescriptor:
        graphs = self._stock.first_graphs
        if graphs is None:
            return _without_graph(rows.num_reqs, rows.num_rows)
        return graphs.dispatch(
            rows.num_reqs,
            rows.num_rows,
            uniform_token_count=None,
            num_active_loras=0,
            max_query_len=int(rows.query_lens.max()),
        )

    # ------------------------------------------------------------ next forwards

    def num_reqs_padded(self, rows: RaggedRows) -> int:
        """Requests whose block tables must be gathered, padding among them."""
        descs = self._first_desc(rows), self._next_desc(rows.num_reqs)
        return max(desc.num_reqs or rows.num_reqs for desc in descs)

    def start(self, idx_mapping: torch.Tensor, positions: torch.Tensor) -> None:
        """These requests go on after these positions; their block tables were gathered.

        Both [num_reqs] int64 on the device: request states; the last positions fed.
        """
        buffers, num_reqs = self._stock.input_buffers, len(idx_mapping)
        self._set_requests(idx_mapping)
        buffers.positions[:num_reqs] = positions
        starts = buffers.query_start_loc
        starts[: num_reqs + 1] = self._stock.arange_gpu[: num_reqs + 1]
        starts[num_reqs + 1 :] = num_reqs

    def run_next(
        self, token_ids: torch.Tensor, draft_position: int, longest: np.ndarray
    ) -> torch.Tensor:
        """Feed one token more of each request and draft after it.

        Args:
            token_ids: [num_reqs] integers, on the device.
            draft_position: 0 for the first draft after the known tokens.
            longest: [num_reqs] int32, at most that long each request is then.

        Returns: [num_reqs] int64 draft token ids.
        """
        stock, num_reqs = self._stock, len(token_ids)
        desc, starts = self._next_desc(num_reqs), stock.arange_np[: num_reqs + 1]
        self._token_ids[:num_reqs] = token_ids
        stock.current_draft_step.fill_(draft_position)
        if desc.cg_mode == CUDAGraphMode.FULL:
            graphs = stock.next_graphs
            assert graphs is not None
            if not stock.supports_decode_metadata_update:
                self._move_on(desc.num_reqs or num_reqs)
            self._prepare_metadata(desc, starts, longest)
            graphs.run_fullgraph(desc)
        else:
            self._move_on(num_reqs)
            metadata = self._attn_metadata(desc, starts, longest)
            self._forward(num_reqs, num_reqs, metadata, self._slot_mappings(num_reqs))
        return self._drafts(num_reqs)

    def _next_desc(self, num_reqs: int) -> BatchExecutionDescriptor:
        graphs = self._stock.next_graphs
        if graphs is None:
            return _without_graph(num_reqs, num_reqs)
        return graphs.dispatch(
            num_reqs, num_reqs, uniform_token_count=1, num_active_loras=0
        )

    def _move_on(self, num_reqs: int) -> None:
        """By one row each. Padding stays without a length, at positions there are."""
        buffers = self._stock.input_buffers
        positions = buffers.positions[:num_reqs]
        buffers.input_ids[:num_reqs] = self._token_ids[:num_reqs]
        torch.clamp(positions + 1, max=self._last_position, out=positions)
        is_real = self._idx_mapping[:num_reqs] != NOBODY
        buffers.seq_lens[:num_reqs] = (positions + 1) * is_real

    # ------------------------------------------------------------ both

    def _set_requests(self, idx_mapping: torch.Tensor) -> None:
        self._idx_mapping[: len(idx_mapping)] = idx_mapping
        self._idx_mapping[len(idx_mapping) :] = NOBODY

    def _forward(
        self,
        num_reqs: int,
        num_rows: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
    ) -> None:
        """Of the rows in the input buffers, with padding. Writes their K/V, and leaves
        a draft after the last of each request, and its position."""
        stock, buffers = self._stock, self._stock.input_buffers
        idx_mapping = self._idx_mapping[:num_reqs]
        starts = buffers.query_start_loc[: num_reqs + 1]
        positions = buffers.positions[:num_rows]
        stock.block_tables.compute_slot_mappings(
            idx_mapping, starts, positions, num_rows
        )
        hidden_states = stock._run_model(
            buffers.input_ids[:num_rows], positions, attn_metadata, slot_mappings, None
        )
        last_rows = (starts[1:] - 1).clamp(min=0)
        self._positions[:num_reqs] = positions[last_rows]
        self._token_ids[:num_reqs] = stock.sample_draft(
            hidden_states[last_rows],
            self._positions[:num_reqs],
            idx_mapping,
            stock.temperature,
            stock.seeds,
            stock.current_draft_step,
            stock.draft_logits,
        )
        if stock.confidence is not None:
            self._confidence[:num_reqs] = stock.confidence

    def _drafts(self, num_reqs: int) -> torch.Tensor:
        """Of the last forward; the next one's take their place here."""
        if self._stock.is_automatic:
            self._stock.confidence = self._confidence[:num_reqs]
        return self._token_ids[:num_reqs].clone()

    def _prepare_metadata(
        self, desc: BatchExecutionDescriptor, starts: np.ndarray, longest: np.ndarray
    ) -> None:
        """What a graph reads of attention metadata and does not write itself."""
        stock = self._stock
        if not stock.supports_decode_metadata_update:
            self._attn_metadata(desc, starts, longest)
            return
        for group in (group for groups in stock.attn_groups for group in groups):
            group.map_to_kernel_block_table(
                stock.block_tables.input_block_tables[group.kv_cache_group_id]
            )

    def _attn_metadata(
        self, desc: BatchExecutionDescriptor, starts: np.ndarray, longest: np.ndarray
    ) -> dict[str, Any] | None:
        """`starts`: [num_reqs + 1] int32, each request's first row, and the end."""
        return self._stock._build_attn_metadata(
            num_reqs=len(longest),
            batch_desc=desc,
            query_start_loc_np=starts,
            seq_lens_cpu_upper_bound=torch.from_numpy(longest),
            step=0,
        )

    def _slot_mappings(self, num_rows: int) -> dict[str, torch.Tensor]:
        """By layer; `_forward` fills them."""
        stock = self._stock
        return build_slot_mappings_by_layer(
            stock.block_tables.slot_mappings[:, :num_rows], stock.kv_cache_config
        )


def _without_graph(num_reqs: int, num_rows: int) -> BatchExecutionDescriptor:
    return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_rows, num_reqs)
