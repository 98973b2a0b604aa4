"""An EAGLE-3 head over vLLM's paged blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_emssd.draft_cursor import DraftCursor
from vllm_emssd.integration.drafting import without_first_blocks
from vllm_emssd.integration.v1.drafter import PagedDrafter
from vllm_emssd.integration.v1.greedy import argmax_with_confidence
from vllm_emssd.proposers.hidden_states import HiddenStates
from vllm_emssd.ragged import RaggedRows


class EagleDrafter(PagedDrafter):
    """As `PagedDrafter`, with hidden states beside the tokens: a step's first forward
    takes the target's, the next ones the head's own.

    Args:
        states: of the target, of all rows that are fed.
        cursor: where each request's text begins for the head.
    """

    def __init__(
        self, *args: Any, states: HiddenStates, cursor: DraftCursor, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._states = states
        self._cursor = cursor
        # Of the rows that the last forward drafted after: hidden states
        # [num_sampled, hidden_size], and whose they are, [num_sampled] batch rows.
        self._own = torch.empty(0)
        self._own_req_indices = np.empty(0, dtype=np.int64)
        # Where the text of each batch row begins in this step.
        self._firsts = np.zeros(self.max_num_reqs, dtype=np.int32)
        # From ids of the head's vocabulary to the target's; None: they are the same.
        self._offsets = getattr(self._stock.model, "draft_id_to_target_id", None)

    def _forward(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        stock = self._stock
        if draft_position == 0:
            firsts = list(map(self._cursor.first, self._input_batch.req_ids))
            self._firsts[: len(firsts)] = firsts
        stock.hidden_states[: rows.num_rows] = (
            self._own_states(rows) if draft_position else self._target_states(rows)
        )
        drafted = super()._forward(rows, token_ids, sampled_rows, draft_position)
        self._own = self._own[async_tensor_h2d(sampled_rows, device=stock.device)]
        self._own_req_indices = rows.row_req_indices[sampled_rows]
        return drafted

    def _sample_greedily(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From the head's own vocabulary, often a small part of the target's:
        `compute_logits` would copy its logits to one of that size."""
        if self._offsets is None:
            return super()._sample_greedily(hidden_states)
        model = self._stock.model
        logits = model.logits_processor(model.lm_head, hidden_states)
        tokens, confidence = argmax_with_confidence(logits, self.returns_confidence)
        return tokens + self._offsets[tokens], confidence

    def _call_model(self, num_rows: int) -> torch.Tensor:
        stock = self._stock
        hidden_states, self._own = stock.model(
            input_ids=stock.input_ids[:num_rows],
            positions=stock.positions[:num_rows],
            hidden_states=stock.hidden_states[:num_rows],
            inputs_embeds=None,
        )
        return hidden_states

    def _own_states(self, rows: RaggedRows) -> torch.Tensor:
        """Of requests that draft on, which keep their order."""
        if rows.num_reqs == len(self._own_req_indices):
            return self._own
        goes_on = np.isin(self._own_req_indices, rows.req_indices)
        return self._own[torch.from_numpy(np.flatnonzero(goes_on))]

    def _target_states(self, rows: RaggedRows) -> torch.Tensor:
        if self._input_batch.num_reqs == 0:  # costs are measured: any states will do
            return self._stock.hidden_states[: rows.num_rows]
        states = self._states.of(torch.from_numpy(self.kv_slots(rows)))
        return self._stock.model.combine_hidden_states(states)

    def _seq_lens(self, rows: RaggedRows) -> np.ndarray:
        return rows.seq_lens - self._firsts[rows.req_indices]

    def _block_tables(self, req_indices: np.ndarray) -> torch.Tensor:
        tables = super()._block_tables(req_indices)
        num_skipped = self._firsts[req_indices] // self._stock.block_size
        if not num_skipped.any():
            return tables
        return without_first_blocks(
            tables, async_tensor_h2d(num_skipped, device=tables.device)
        )
