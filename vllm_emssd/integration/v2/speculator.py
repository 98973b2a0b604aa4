"""vLLM's stand-alone draft-model speculator (V2 runner) with unpadded drafting.

Stock feeds the drafter all scheduled rows of every request again, rejected ones
included, and one more, then one row a request and draft: 2K+1 of a decoding request.
This feeds the last two tokens of each request, which is all that the drafter can lack
of one that drafted before, and then one row a draft: K+1. The device finds them, so the
host launches the drafter while the target still runs, and learns of the acceptance with
the step's output. Requests that lack more are fed it in a pass of their own before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import (
    StandaloneARSpeculator,
)
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from vllm_emssd.integration.costs import CONTEXT
from vllm_emssd.integration.v2.drafter import FIRST_ROWS, DeviceDrafter
from vllm_emssd.integration.v2.drafting_speculator import DraftingSpeculator

logger = init_logger("vllm.emssd.v2")


class UnpadSpeculator(DraftingSpeculator, StandaloneARSpeculator):
    """Feeds a draft model by itself, with the forwards of a `DeviceDrafter`."""

    num_first_rows = FIRST_ROWS
    drafter: DeviceDrafter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # See `DeviceDrafter`. Here vLLM finds and drops them after profiling.
        self.first_graphs: SpeculatorCudaGraphManager | None = None
        self.next_graphs: SpeculatorCudaGraphManager | None = None

    # ------------------------------------------------------------ start-up

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn(*args, **kwargs)
        max_model_len = min(self.draft_model_config.max_model_len, self.max_model_len)
        self.drafter = DeviceDrafter(self, self._req_states, max_model_len)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Draft forwards are recorded whole where the target's are."""
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
            return
        support = self.attn_cg_support
        takes_rows = (
            support.min_cg_support.value >= AttentionCGSupport.UNIFORM_BATCH.value
        )
        if not self.supports_decode_metadata_update or not takes_rows:
            logger.warning(
                "Draft forwards run without CUDA graphs: attention (%s) cannot be "
                "replayed with %d rows a request, or not with lengths of the device's.",
                support.min_cg_attn_backend or "the draft model's",
                FIRST_ROWS,
            )
            return
        self.first_graphs, self.next_graphs = (
            SpeculatorCudaGraphManager(
                self.vllm_config,
                self.device,
                CUDAGraphMode.FULL_DECODE_ONLY,
                decode_query_len=rows,
            )
            for rows in (FIRST_ROWS, 1)
        )

    def graphs_of(self, rows: int) -> SpeculatorCudaGraphManager | None:
        """Of forwards with so many rows of each request, if any."""
        return self.next_graphs if rows == 1 else self.first_graphs

    def capture(self) -> None:
        self.drafter.capture()

    def dummy_forward(self, num_reqs: int, dummy_run: Callable[..., Any]) -> None:
        self.drafter.dummy_forward(num_reqs, min(CONTEXT, self.drafter.max_model_len))

    # ------------------------------------------------------------ a step

    def propose(
        self,
        input_batch: InputBatch,
        *args: Any,
        dummy_run: bool = False,
        is_profile: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As stock's; adaptive verification times dummy runs, to know what drafts
        cost."""
        is_timed = dummy_run and not is_profile and self.enable_adaptive_verification
        if is_timed and not self.skips_dummy_drafting:
            num_reqs = min(input_batch.num_reqs, self.drafter.max_num_reqs)
            for _ in range(self._max_drafts):
                self.drafter.dummy_forward(num_reqs, self.drafter.max_model_len // 2)
            return self.draft_tokens[: input_batch.num_reqs]
        kwargs |= {"dummy_run": dummy_run, "is_profile": is_profile}
        return super().propose(input_batch, *args, **kwargs)

    def _backfill(
        self,
        input_batch: InputBatch,
        num_rows: np.ndarray,
        num_uncached_tokens: np.ndarray,
        longest: np.ndarray,
    ) -> None:
        fed = np.flatnonzero(num_rows)
        num_rows, longest = num_rows[fed], longest[fed]
        num_uncached_tokens = num_uncached_tokens[fed]
        idx_mapping = self._rows_of(input_batch.idx_mapping, fed)
        self.drafter.backfill(idx_mapping, num_rows, num_uncached_tokens, longest)
        slots = input_batch.idx_mapping_np[fed]
        self._cursor.feed(slots, num_rows)
        self._count_forward(slots, longest - num_uncached_tokens + num_rows, num_rows)

    def _draft(self, input_batch: InputBatch, lens: np.ndarray) -> torch.Tensor:
        drafting, depth = np.flatnonzero(lens), int(lens.max())
        slots, num_drafting = input_batch.idx_mapping_np[drafting], len(drafting)
        longest = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        longest = longest[drafting] + 1
        idx_mapping = self._rows_of(input_batch.idx_mapping, drafting)
        self.drafter.draft(idx_mapping, depth, longest)
        self._cursor.draft(slots, lens[drafting] - 1)
        num_rows = np.full(num_drafting, FIRST_ROWS)
        self._count_forward(slots, longest, num_rows)
        self._count_next_forwards(depth - 1, num_drafting)
        if self.enable_adaptive_verification and num_drafting < len(lens):
            # It expects confidences in the batch's order.
            confidences = self.draft_token_confidence_probs
            rows = async_tensor_h2d(drafting, device=self.device)
            confidences[rows] = confidences[:num_drafting].clone()
        return self.draft_tokens[:num_drafting]
