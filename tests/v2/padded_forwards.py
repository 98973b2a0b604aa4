"""Forwards padded as recorded ones are, where nothing can be recorded."""

from __future__ import annotations

from typing import Any

from vllm_emssd.integration.v2.cudagraphs import (
    MOST_FIRST_ROWS,
    DraftForwardGraphs,
)

PADDING = 2  # requests; of first forwards another row too


class PaddedForwards:
    """Takes the place of one of a speculator's graph managers: does forwards anew, with
    the padding that a graph would have."""

    def __init__(self, recorded: DraftForwardGraphs, most_rows: int) -> None:
        """`most_rows` of a request: 1, or `MOST_FIRST_ROWS`."""
        self.num_replays = 0
        self._recorded = recorded
        self._most_rows = most_rows
        self._metadata: Any = None
        build = recorded._attn_metadata

        def build_and_keep(*args: Any) -> Any:
            self._metadata = build(*args)
            return self._metadata

        recorded._attn_metadata = build_and_keep

    def needs_capture(self) -> bool:
        return False

    def dispatch(
        self,
        num_reqs: int,
        num_rows: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
    ) -> Any:
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        if (max_query_len or 1) > self._most_rows:
            return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_rows, num_reqs)
        room = self._recorded._stock.max_num_reqs - num_reqs
        padded = num_reqs + min(PADDING, room)
        rows = padded if self._most_rows == 1 else num_rows + PADDING + 1
        return BatchExecutionDescriptor(CUDAGraphMode.FULL, rows, padded)

    def run_fullgraph(self, batch_desc: Any) -> None:
        self.num_replays += 1
        rows = batch_desc.num_tokens
        self._recorded._forward(
            batch_desc.num_reqs,
            rows,
            self._metadata,
            self._recorded._slot_mappings(rows),
        )


def pad_forwards(speculator: Any) -> list[PaddedForwards]:
    """From now on of this speculator: (first, next) ones."""
    recorded = speculator._drafter._recorded
    first = PaddedForwards(recorded, MOST_FIRST_ROWS)
    speculator.first_graphs = first
    speculator.next_graphs = PaddedForwards(recorded, 1)
    return [first, speculator.next_graphs]
