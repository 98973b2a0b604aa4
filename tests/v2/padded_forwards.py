"""Forwards padded as recorded ones are, where nothing can be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

PADDING = 2  # requests


class PaddedForwards:
    """Takes the place of one of a speculator's graph managers: does forwards anew, with
    the padding that a graph would have."""

    def __init__(self, speculator: Any, rows: int) -> None:
        """`rows` of each request."""
        self.num_replays = 0
        self._drafter = speculator.drafter
        self._most = speculator.max_num_reqs
        self._rows = rows
        self._num_reqs = 0  # of them no padding

    def needs_capture(self) -> bool:
        return False

    def dispatch(
        self,
        num_reqs: int,
        num_rows: int,
        uniform_token_count: int | None,
        num_active_loras: int,
    ) -> Any:
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        assert uniform_token_count == self._rows
        self._num_reqs = num_reqs
        # Another of next forwards than of first ones, as with graphs.
        padded = min(num_reqs + PADDING * (3 - self._rows), self._most)
        return BatchExecutionDescriptor(
            CUDAGraphMode.FULL, padded * self._rows, padded, uniform_token_count
        )

    def run_fullgraph(self, batch_desc: Any) -> None:
        """With metadata that a backend without updates in place needs anew."""
        self.num_replays += 1
        lens = self._drafter._stock.input_buffers.seq_lens[: self._num_reqs]
        longest = lens.numpy().astype(np.int64)
        self._drafter.launch(batch_desc, self._num_reqs, longest)


def pad_forwards(speculator: Any) -> list[PaddedForwards]:
    """From now on of this speculator: (first, next) ones."""
    speculator.first_graphs = PaddedForwards(speculator, 2)
    speculator.next_graphs = PaddedForwards(speculator, 1)
    return [speculator.first_graphs, speculator.next_graphs]


class HeadForwards:
    """Takes the place of a graph manager of vLLM's EAGLE speculator."""

    def __init__(self, forward: Callable[[int, int], None]) -> None:
        """`forward`: of so many requests and rows."""
        self._forward = forward

    def dispatch(
        self, num_reqs: int, num_rows: int, uniform_token_count: int | None, **_: Any
    ) -> Any:
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        mode = CUDAGraphMode.FULL if uniform_token_count else CUDAGraphMode.NONE
        return BatchExecutionDescriptor(mode, num_rows, num_reqs, uniform_token_count)

    def specialize_spec_tokens(self, batch_desc: Any, num_drafts: int) -> Any:
        return batch_desc

    def run_fullgraph(self, batch_desc: Any) -> None:
        self._forward(batch_desc.num_reqs, batch_desc.num_tokens)


def replay_head(speculator: Any) -> list[HeadForwards]:
    """From now on of this speculator: its first pass, and all others as one."""
    import torch
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    def first(num_reqs: int, num_rows: int) -> None:
        metadata, slots = speculator._attn_metadata, speculator._inputs[0]
        speculator._prefill(num_reqs, num_rows, metadata, slots, None)

    def others(num_reqs: int, num_rows: int) -> None:
        desc = BatchExecutionDescriptor(CUDAGraphMode.NONE, num_rows, num_reqs)
        longest = torch.full((num_reqs,), speculator.max_model_len, dtype=torch.int32)
        speculator._multi_step_decode(
            num_reqs, False, desc, None, longest, speculator.num_speculative_steps
        )

    graphs = [HeadForwards(first), HeadForwards(others)]
    speculator.prefill_cudagraph_manager, speculator.decode_cudagraph_manager = graphs
    speculator.supports_decode_metadata_update = True
    return graphs
