"""LoRA adapters by verified row: vLLM's V2 runner tells the LM head one a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.lora_utils import LoraState


class RowLoraState(LoraState):
    num_drafts: Mapping[str, int] = {}  # of the step's requests, those that have any

    def make_lora_inputs(
        self, req_ids: list[str], idx_mapping: np.ndarray, *args: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], set[LoRARequest]]:
        """Adapters by verified row, adapters by token, and those in use."""
        _, by_token, active = super().make_lora_inputs(req_ids, idx_mapping, *args)
        num_rows = [1 + self.num_drafts.get(req_id, 0) for req_id in req_ids]
        return tuple(self.lora_ids[idx_mapping].repeat(num_rows)), by_token, active
