"""The draft model over vLLM's V2 block tables: one varlen forward of ragged rows.

Wraps the speculator object of vLLM's V2 runner (weights, KV-cache layers, buffers and
attention builders are all vLLM's) and feeds it the rows we choose. Where the host only
knows a request's length by a bound, the device moves the host's positions to where they
really are. Nothing is copied from the device, except with automatic lengths how sure
each draft is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_emssd.integration.forward_clock import ForwardClock
from vllm_emssd.ragged import RaggedRows

if TYPE_CHECKING:
    from vllm_emssd.integration.speculator_v2 import UnpadSpeculator


@dataclass(frozen=True, slots=True)
class BatchOnDevice:
    """What the device knows of a step's batch rows and the host does not."""

    idx_mapping: torch.Tensor  # [num_reqs] int64: batch row -> request state
    moved_by: torch.Tensor | None  # [num_reqs] int64: added to the host's positions
    max_moved_by: np.ndarray  # [num_reqs] int64: at most that much
    is_constrained: np.ndarray  # [num_reqs] bool: by a grammar

    @classmethod
    def of_first_states(cls, num_reqs: int, device: torch.device) -> BatchOnDevice:
        """Rows are the first request states, with or without requests in them."""
        return cls(
            torch.arange(num_reqs, device=device),
            None,
            np.zeros(num_reqs, dtype=np.int64),
            np.zeros(num_reqs, dtype=bool),
        )

    def moved_positions(
        self, req_indices: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """True positions of rows; both [num_rows] int64, on the device. Negative ones
        come up in vLLM's warm-up alone, whose steps overstate what was accepted."""
        if self.moved_by is None:
            return positions
        return (positions + self.moved_by[req_indices]).clamp_(min=0)


class KnownTokens:
    """Known tokens by batch row and position, as `DraftBatch.token_ids` has them."""

    def __init__(self, all_token_ids: torch.Tensor, batch: BatchOnDevice) -> None:
        self._all_token_ids = all_token_ids  # [max_num_reqs, max_model_len] int32
        self._batch = batch

    def __getitem__(self, rows: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        """`rows`: batch rows and the host's positions, [num_rows] int64 both."""
        device = self._all_token_ids.device
        req_indices, positions = (async_tensor_h2d(x, device=device) for x in rows)
        positions = self._batch.moved_positions(req_indices, positions)
        return self._all_token_ids[self._batch.idx_mapping[req_indices], positions]


class PagedDrafterV2:
    """Implements `proposers.draft_model.Drafter`.

    Args:
        stock: vLLM's speculator, with its KV cache bound (`set_attn` was called).
        max_model_len: positions that both models can take.
    """

    def __init__(self, stock: UnpadSpeculator, max_model_len: int) -> None:
        self.max_num_rows: int = stock.max_num_tokens
        self.max_num_reqs: int = stock.max_num_reqs
        self.max_model_len = max_model_len
        self._stock = stock
        self._batch: BatchOnDevice
        self._clock: ForwardClock | None = None

    def time_by(self, clock: ForwardClock) -> None:
        """Time forwards from now on."""
        self._clock = clock

    def take_timings(self) -> list[tuple[int, float]]:
        """See `step_costs.TimedForwards`."""
        return [] if self._clock is None else self._clock.take_timings()

    def start_step(self, batch: BatchOnDevice) -> None:
        self._batch = batch

    @torch.inference_mode()
    def forward(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        if self._clock is not None:
            self._clock.start()
        tokens = self._draft(rows, token_ids, sampled_rows, draft_position)
        if self._clock is not None:
            self._clock.stop(rows.num_rows)
        if self._stock.confidence is None or len(sampled_rows) == 0:
            return tokens, None
        # sync: decides who drafts on
        return tokens, self._stock.confidence.cpu().numpy()

    def _draft(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> torch.Tensor:
        if isinstance(token_ids, np.ndarray):
            token_ids = self._to_device(token_ids)
        self._fill_buffers(rows, token_ids)
        hidden_states = self._run_model(rows)
        if len(sampled_rows) == 0:
            return torch.empty(0, dtype=torch.int64, device=hidden_states.device)
        index = self._to_device(sampled_rows)
        req_indices = rows.row_req_indices[sampled_rows]
        idx_mapping = self._batch.idx_mapping[self._to_device(req_indices)]
        stock = self._stock
        stock.current_draft_step.fill_(draft_position)
        tokens = stock.sample_draft(
            hidden_states[index],
            stock.input_buffers.positions[index],
            idx_mapping,
            stock.temperature,
            stock.seeds,
            stock.current_draft_step,
            stock.draft_logits,
        )
        self._make_one_hot(req_indices, tokens, draft_position)
        return tokens

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return async_tensor_h2d(array, device=self._stock.device)

    def _fill_buffers(self, rows: RaggedRows, token_ids: torch.Tensor) -> None:
        """Rows to the speculator's input buffers, at their true positions."""
        buffers, num_reqs, num_rows = (
            self._stock.input_buffers,
            rows.num_reqs,
            rows.num_rows,
        )
        positions = self._to_device(rows.positions)
        row_req_indices = self._to_device(rows.row_req_indices)
        buffers.input_ids[:num_rows] = token_ids
        buffers.positions[:num_rows] = self._batch.moved_positions(
            row_req_indices, positions
        )
        query_start_loc = buffers.query_start_loc
        async_tensor_h2d(rows.query_start_loc, out=query_start_loc[: num_reqs + 1])
        query_start_loc[num_reqs + 1 :] = num_rows
        last_rows = query_start_loc[1 : num_reqs + 1].long() - 1
        buffers.seq_lens[:num_reqs] = buffers.positions[last_rows] + 1
        buffers.seq_lens[num_reqs:] = 0

    def _run_model(self, rows: RaggedRows) -> torch.Tensor:
        """Returns hidden states, [num_rows, hidden_size]."""
        stock, buffers = self._stock, self._stock.input_buffers
        num_reqs, num_rows = rows.num_reqs, rows.num_rows
        idx_mapping = self._batch.idx_mapping[self._to_device(rows.req_indices)]
        stock.block_tables.gather_block_tables(idx_mapping, num_reqs_padded=num_reqs)
        slot_mappings = stock.block_tables.compute_slot_mappings(
            idx_mapping,
            buffers.query_start_loc[: num_reqs + 1],
            buffers.positions[:num_rows],
            num_rows,
        )
        longest = rows.seq_lens + self._batch.max_moved_by[rows.req_indices]
        attn_metadata = stock._build_attn_metadata(
            num_reqs=num_reqs,
            batch_desc=BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE, num_tokens=num_rows, num_reqs=num_reqs
            ),
            query_start_loc_np=rows.query_start_loc,
            seq_lens_cpu_upper_bound=torch.from_numpy(longest.astype(np.int32)),
            step=0,
            slot_mappings=slot_mappings,
        )
        return stock._run_model(
            buffers.input_ids[:num_rows],
            buffers.positions[:num_rows],
            attn_metadata,
            build_slot_mappings_by_layer(slot_mappings, stock.kv_cache_config),
            None,
        )

    def _make_one_hot(
        self, req_indices: np.ndarray, tokens: torch.Tensor, draft_position: int
    ) -> None:
        """Drafts under a grammar are greedy: say so to the rejection sampler, which
        would else take them for samples of the drafter's distribution."""
        draft_logits = self._stock.draft_logits
        constrained = np.flatnonzero(self._batch.is_constrained[req_indices])
        if draft_logits is None or constrained.size == 0:
            return
        index = self._to_device(constrained)
        states = self._batch.idx_mapping[self._to_device(req_indices[constrained])]
        draft_logits[states, draft_position] = float("-inf")
        draft_logits[states, draft_position, tokens[index]] = 0.0
