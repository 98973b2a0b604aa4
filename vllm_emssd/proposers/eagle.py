"""Drafts from an EAGLE head, fed only tokens whose draft K/V is missing.

A row at position p takes the target's hidden state at p and the token at p + 1, and
drafts the token at p + 2. Drafts follow on the head's own hidden states, so an accepted
draft's K/V is not that of its token: accepted tokens are fed again, with the target's
hidden states, in the next step's first forward. That has one row for each new token,
and no row for a rejected draft.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.hidden_states import HiddenStates
from vllm_emssd.ragged import RaggedRows


class EagleProposer(DraftModelProposer):
    """As `DraftModelProposer`, with a cursor over rows: row p belongs to position p,
    but needs the token behind it.

    A request of which not all hidden states are here begins its text anew at the first
    block from which on they are.

    Args:
        states: of the target, kept of each step before `propose`.
        kv_slots: gives the slot of each row's K/V, [num_rows] int64.
        block_size: of the KV cache.
    """

    _token_offset = 1
    _keeps_fed_drafts = False

    def __init__(
        self,
        *args: Any,
        states: HiddenStates,
        kv_slots: Callable[[RaggedRows], np.ndarray],
        block_size: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._states = states
        self._kv_slots = kv_slots
        self._block_size = block_size

    def _missing_spans(self, batch: DraftBatch) -> tuple[np.ndarray, np.ndarray]:
        """Rows whose K/V is missing and can be computed."""
        starts, ends = super()._missing_spans(batch)
        # The row of the last known token would take the token behind it.
        ends = np.where(batch.is_sampling, np.minimum(ends, batch.num_tokens - 1), ends)
        # States of the step itself were kept just now; older ones may be gone.
        computed_before = batch.num_prefilled_tokens - batch.num_scheduled_tokens
        lacking = np.flatnonzero((ends > starts) & (starts < computed_before))
        if lacking.size:
            rows = RaggedRows.from_spans(lacking, starts[lacking], ends[lacking])
            is_lost = ~self._states.are_here(self._kv_slots(rows))
            behind = np.where(is_lost, rows.positions + 1, 0)
            behind = np.maximum.reduceat(behind, rows.query_start_loc[:-1])
            restarts = -(-behind // self._block_size) * self._block_size
            starts[lacking] = np.maximum(starts[lacking], restarts)
        return starts, np.maximum(starts, ends)

    def _start_feeding(
        self, batch: DraftBatch, fed: np.ndarray, starts: np.ndarray
    ) -> None:
        for i in fed:
            req_id, start = batch.req_ids[i], int(starts[i])
            if start > self._cursor.draft_len(req_id):
                self._cursor.restart_at(req_id, start)
                self._counters.num_draft_restarts += 1
