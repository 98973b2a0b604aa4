"""A speculator whose model is arithmetic, over vLLM's own buffers and block tables: its
drafts can be worked out from the text alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

VOCAB = 97
BLOCK_SIZE = 4
MAX_LEN = 48
MAX_REQS = 6
MAX_ROWS = MAX_REQS * MAX_LEN
K = 4


def value_of(token: Any, position: Any) -> Any:
    """What a token leaves in the K/V cache."""
    return (token + 1) * (position + 3) * 31 % 1009


def continuation(tokens: list[int], depth: int) -> list[int]:
    """Drafts after a text."""
    text = list(tokens)
    for _ in range(depth):
        total = sum(value_of(token, i) for i, token in enumerate(text))
        text.append((total + len(text) - 1) % VOCAB)
    return text[len(tokens) :]


class ToySpeculator:
    """What `DeviceDrafter` asks of vLLM's speculator."""

    def __init__(self) -> None:
        from vllm.v1.worker.gpu.block_table import BlockTables
        from vllm.v1.worker.gpu.input_batch import InputBuffers

        device = torch.device("cpu")
        self.device, self.max_num_reqs, self.max_num_tokens = device, MAX_REQS, MAX_ROWS
        self.num_speculative_steps = K
        self.idx_mapping = torch.zeros(MAX_REQS, dtype=torch.int64)
        self.arange_np = np.arange(MAX_REQS + 1, dtype=np.int32)
        self.current_draft_step = torch.tensor(0)
        self.draft_tokens = torch.full((MAX_REQS, K), -7)
        self.temperature = self.seeds = self.draft_logits = None
        self.input_buffers = InputBuffers(MAX_REQS, MAX_ROWS, device)
        blocks = MAX_LEN // BLOCK_SIZE
        self.block_tables = BlockTables(
            [BLOCK_SIZE], MAX_REQS, MAX_ROWS, [blocks], device
        )
        self.attn_groups: list[Any] = []
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[])
        # The last slot takes what is written nowhere.
        self.cache = torch.zeros(MAX_REQS * MAX_LEN + 1, dtype=torch.int64)
        for i in range(MAX_REQS):
            ids = list(range(i * blocks, (i + 1) * blocks))
            self.block_tables.append_block_ids(i, (ids,), overwrite=True)
        self.block_tables.apply_staged_writes()
        self.graphs: dict[int, Any] = {}

    def graphs_of(self, rows: int) -> Any:
        return self.graphs.get(rows)

    def _build_attn_metadata(self, **kwargs: Any) -> None:
        return None

    def _update_draft_decode_metadata(self, metadata: Any, num_reqs: int) -> None: ...

    def _run_model(
        self, input_ids: torch.Tensor, positions: torch.Tensor, *args: Any
    ) -> torch.Tensor:
        """[num_rows] the sum of all values up to each row, as attention reads them."""
        num_rows, buffers = len(input_ids), self.input_buffers
        slots = self.block_tables.slot_mappings[0, :num_rows]
        slots = torch.where(slots < 0, len(self.cache) - 1, slots)
        self.cache[slots] = value_of(input_ids.long(), positions)
        rows = torch.arange(num_rows, dtype=torch.int32)
        reqs = torch.searchsorted(buffers.query_start_loc, rows, right=True) - 1
        reqs = reqs.clamp(0, MAX_REQS - 1)
        at = torch.arange(MAX_LEN)
        blocks = self.block_tables.input_block_tables[0][reqs].long()
        values = self.cache[blocks[:, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE]
        # Row i of a request's last rows sees all but those behind it.
        behind = buffers.query_start_loc[reqs + 1] - 1 - rows
        ends = buffers.seq_lens[reqs] - behind
        return torch.where(at < ends[:, None], values, 0).sum(dim=1)

    def sample_draft(
        self, hidden: torch.Tensor, positions: torch.Tensor, *args: Any
    ) -> torch.Tensor:
        return (hidden + positions) % VOCAB
