"""The draft model over vLLM's V2 block tables: one varlen forward of ragged rows.

Wraps the speculator object of vLLM's V2 runner (weights, KV-cache layers, buffers and
attention builders are all vLLM's) and feeds it the rows we choose. Where the host only
knows a request's length by a bound, the device moves the host's positions to where they
really are. Nothing is copied from the device, except with automatic lengths how sure
each draft is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_emssd.integration.forward_clock import ForwardClock
from vllm_emssd.integration.v2.cudagraphs import DraftForwardGraphs
from vllm_emssd.ragged import RaggedRows

if TYPE_CHECKING:
    from vllm_emssd.integration.v2.speculator import UnpadSpeculator


@dataclass(frozen=True, slots=True)
class BatchOnDevice:
    """What the device knows of a step's batch rows and the host does not."""

    idx_mapping: torch.Tensor  # [num_reqs] int64: batch row -> request state
    moved_by: torch.Tensor | None  # [num_reqs] int64: added to the host's positions
    max_moved_by: np.ndarray  # [num_reqs] int64: at most that much
    is_greedy: np.ndarray  # [num_reqs] bool: drafts greedily, whatever its temperature

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


@dataclass(frozen=True, slots=True)
class _Drafting:
    """The requests that a forward drafted for, as the device has them, in that order.
    A next forward of the same ones needs nothing more of the host than their drafts."""

    req_indices: np.ndarray  # [num_sampled] int64 batch rows
    idx_mapping: torch.Tensor  # [num_sampled] int64 request states
    positions: torch.Tensor  # [num_sampled] int64 of the rows drafted after
    are_all: bool  # that were in the forward, so that the block tables are theirs
    is_placed: bool = False  # in `DraftForwardGraphs`, which then knows where they are

    def goes_on(self, rows: RaggedRows) -> bool:
        """With one row more each."""
        return self.are_all and np.array_equal(self.req_indices, rows.req_indices)


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
        self.tells_confidence = False
        self._stock = stock
        self._recorded = DraftForwardGraphs(stock, max_model_len)
        self._batch: BatchOnDevice
        self._drafting: _Drafting | None = None  # in the step's last forward
        self._clock: ForwardClock | None = None

    def time_by(self, clock: ForwardClock) -> None:
        """Time forwards from now on."""
        self._clock = clock

    def take_timings(self) -> list[tuple[int, float]]:
        """See `step_costs.TimedForwards`."""
        return [] if self._clock is None else self._clock.take_timings()

    def start_step(self, batch: BatchOnDevice) -> None:
        self._batch = batch
        self._drafting = None

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
        if not self.tells_confidence or len(sampled_rows) == 0:
            return tokens, None
        assert self._stock.confidence is not None
        # sync: decides which requests draft on
        return tokens, self._stock.confidence.cpu().numpy()

    def capture(self) -> None:
        """Record CUDA graphs, if any are wanted."""
        self._recorded.capture()

    def _draft(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> torch.Tensor:
        tokens = torch.as_tensor(token_ids, device=self._stock.device)
        if rows.has_one_row_each and len(sampled_rows) == rows.num_rows:
            return self._draft_after_one_each(rows, tokens, draft_position)
        return self._draft_anew(rows, tokens, sampled_rows, draft_position)

    def _draft_after_one_each(
        self, rows: RaggedRows, token_ids: torch.Tensor, draft_position: int
    ) -> torch.Tensor:
        """A forward of one row a request, all drafted after."""
        drafting = self._drafting
        if not draft_position or drafting is None or not drafting.goes_on(rows):
            drafting = self._place_one_each(rows)
        if not drafting.is_placed:
            self._recorded.start(drafting.idx_mapping, drafting.positions)
        self._drafting = replace(drafting, is_placed=True)
        tokens = self._recorded.run_next(token_ids, draft_position, self._longest(rows))
        self._make_one_hot(drafting, tokens, draft_position)
        return tokens

    def _place_one_each(self, rows: RaggedRows) -> _Drafting:
        """Any requests; their block tables are gathered."""
        req_indices, positions = self._to_device(rows.req_indices, rows.positions)
        idx_mapping = self._batch.idx_mapping[req_indices]
        self._gather_block_tables(rows, idx_mapping)
        positions = self._batch.moved_positions(req_indices, positions)
        return _Drafting(rows.req_indices, idx_mapping, positions - 1, are_all=True)

    def _gather_block_tables(self, rows: RaggedRows, idx_mapping: torch.Tensor) -> None:
        self._stock.block_tables.gather_block_tables(
            idx_mapping, self._recorded.num_reqs_padded(rows)
        )

    def _draft_anew(
        self,
        rows: RaggedRows,
        token_ids: torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> torch.Tensor:
        """A forward of any rows, of which some or none are drafted after."""
        self._drafting = None
        sampled_req_indices = rows.row_req_indices[sampled_rows]
        on_device = self._to_device(
            rows.req_indices,
            rows.query_start_loc,
            rows.row_req_indices,
            rows.positions,
            sampled_rows,
            sampled_req_indices,
        )
        req_indices, *places, sampled, sampled_requests = on_device
        self._fill_buffers(rows, token_ids, *places)
        idx_mapping = self._batch.idx_mapping[req_indices]
        self._gather_block_tables(rows, idx_mapping)
        are_all = len(sampled_rows) == rows.num_reqs
        if are_all and self._recorded.has_first(rows):
            tokens, positions = self._recorded.run_first(
                rows, idx_mapping, draft_position, self._longest(rows)
            )
            drafting = _Drafting(sampled_req_indices, idx_mapping, positions, are_all)
            self._make_one_hot(drafting, tokens, draft_position)
        else:
            hidden_states = self._run_model(rows, idx_mapping)
            if len(sampled_rows) == 0:
                return torch.empty(0, dtype=torch.int64, device=hidden_states.device)
            positions = self._stock.input_buffers.positions[sampled]
            drafting = _Drafting(
                sampled_req_indices,
                self._batch.idx_mapping[sampled_requests],
                positions,
                are_all,
            )
            tokens = self._sample(hidden_states[sampled], drafting, draft_position)
        self._drafting = drafting
        return tokens

    def _to_device(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """int64, copied together."""
        together = async_tensor_h2d(
            np.concatenate(arrays, dtype=np.int64), device=self._stock.device
        )
        return together.split([len(array) for array in arrays])

    def _fill_buffers(
        self,
        rows: RaggedRows,
        token_ids: torch.Tensor,
        query_start_loc: torch.Tensor,
        row_req_indices: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Rows to the speculator's input buffers, at their true positions. The last
        three are those of `rows`, on the device, int64."""
        buffers, num_reqs, num_rows = (
            self._stock.input_buffers,
            rows.num_reqs,
            rows.num_rows,
        )
        buffers.input_ids[:num_rows] = token_ids
        buffers.positions[:num_rows] = self._batch.moved_positions(
            row_req_indices, positions
        )
        buffers.query_start_loc[: num_reqs + 1] = query_start_loc
        buffers.query_start_loc[num_reqs + 1 :] = num_rows
        last_rows = query_start_loc[1:] - 1
        buffers.seq_lens[:num_reqs] = buffers.positions[last_rows] + 1
        buffers.seq_lens[num_reqs:] = 0

    def _run_model(self, rows: RaggedRows, idx_mapping: torch.Tensor) -> torch.Tensor:
        """Returns hidden states, [num_rows, hidden_size].

        `idx_mapping`: [num_reqs] int64, request states of `rows`."""
        stock, buffers = self._stock, self._stock.input_buffers
        num_reqs, num_rows = rows.num_reqs, rows.num_rows
        slot_mappings = stock.block_tables.compute_slot_mappings(
            idx_mapping,
            buffers.query_start_loc[: num_reqs + 1],
            buffers.positions[:num_rows],
            num_rows,
        )
        attn_metadata = stock._build_attn_metadata(
            num_reqs=num_reqs,
            batch_desc=BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE, num_tokens=num_rows, num_reqs=num_reqs
            ),
            query_start_loc_np=rows.query_start_loc,
            seq_lens_cpu_upper_bound=torch.from_numpy(self._longest(rows)),
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

    def _longest(self, rows: RaggedRows) -> np.ndarray:
        """At most that long is each request. [num_reqs] int32"""
        longest = rows.seq_lens + self._batch.max_moved_by[rows.req_indices]
        return longest.astype(np.int32)

    def _sample(
        self, hidden_states: torch.Tensor, drafting: _Drafting, draft_position: int
    ) -> torch.Tensor:
        stock = self._stock
        stock.current_draft_step.fill_(draft_position)
        tokens = stock.sample_draft(
            hidden_states,
            drafting.positions,
            drafting.idx_mapping,
            stock.temperature,
            stock.seeds,
            stock.current_draft_step,
            stock.draft_logits,
        )
        self._make_one_hot(drafting, tokens, draft_position)
        return tokens

    def _make_one_hot(
        self, drafting: _Drafting, tokens: torch.Tensor, draft_position: int
    ) -> None:
        """Of requests that draft greedily: say so to the rejection sampler, which would
        else take their drafts for samples of the drafter's distribution."""
        draft_logits = self._stock.draft_logits
        greedy = np.flatnonzero(self._batch.is_greedy[drafting.req_indices])
        if draft_logits is None or greedy.size == 0:
            return
        (index,) = self._to_device(greedy)
        states = drafting.idx_mapping[index]
        draft_logits[states, draft_position] = float("-inf")
        draft_logits[states, draft_position, tokens[index]] = 0.0
