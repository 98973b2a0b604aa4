"""A `Drafter` that remembers what the draft model would say, and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.ragged import RaggedRows
from vllm_emssd.simulate.traces import RequestTrace

REJECTED = -1  # stands for every draft that the target will not accept


class ReplayDrafter:
    """Implements `proposers.draft_model.Drafter` from a trace.

    Args:
        costs: of its forwards, and of telling confidences.
        launches: what a forward takes the host.
        max_num_rows: most rows of one forward.
        max_model_len: positions the draft model can take.
    """

    def __init__(
        self,
        costs: StepCosts,
        launches: CostTable,
        max_num_rows: int,
        max_model_len: int,
    ) -> None:
        self.max_num_rows = max_num_rows
        self.max_model_len = max_model_len
        self.returns_confidence = False
        self._costs, self._launches = costs, launches
        self._ms = self._host_ms = 0.0

    def begin_step(
        self, requests: Sequence[RequestTrace], num_output_tokens: Sequence[int], k: int
    ) -> None:
        """Look up the drafts after the known tokens of each batch row.

        Beyond the record (drafts of requests that end in this step) none is accepted.
        """
        shape = (len(requests), k)
        self._tokens = np.full(shape, REJECTED, dtype=np.int64)
        self._confidence = np.zeros(shape)
        for i, (request, p) in enumerate(zip(requests, num_output_tokens, strict=True)):
            if 0 < p < len(request.accepted):
                num_accepted = min(request.accepted[p], k)
                self._tokens[i, :num_accepted] = request.output_ids[
                    p : p + num_accepted
                ]
                self._confidence[i] = request.confidences[p][:k]

    def take_ms(self) -> tuple[float, float]:
        """Milliseconds of the forwards since the last call, and of launching them."""
        ms = self._ms, self._host_ms
        self._ms = self._host_ms = 0.0
        return ms

    def forward(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        self._ms += self._costs.draft.at(rows.num_rows)
        self._host_ms += self._launches.at(rows.num_rows)
        if self.returns_confidence:
            self._ms += self._costs.confidence_ms
            self._ms += self._costs.deciding_ms * (draft_position == 0)
        requests = rows.row_req_indices[sampled_rows]
        tokens = self._tokens[requests, draft_position]
        return torch.from_numpy(tokens), self._confidence[requests, draft_position]
