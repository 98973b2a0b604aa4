"""A `Drafter` that remembers what the draft model would say, and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.ragged import RaggedRows
from vllm_emssd.simulate.request import SimulatedRequest

REJECTED = -1  # stands for every draft that the target will not accept


@dataclass(frozen=True, slots=True)
class DrafterSetting:
    """The replayed draft model: what its forwards cost, and its limits."""

    costs: StepCosts
    k: int
    max_num_seqs: int
    max_num_rows: int  # of one forward
    max_model_len: int
    launches: CostTable  # what a forward takes the host


class ReplayDrafter:
    """Implements `proposers.draft_model.Drafter` from a trace."""

    def __init__(self, setting: DrafterSetting) -> None:
        self.max_num_rows = setting.max_num_rows
        self.max_model_len = setting.max_model_len
        self.returns_confidence = False
        self._setting = setting
        self._ms = self._host_ms = 0.0

    def begin_step(self, requests: Sequence[SimulatedRequest]) -> None:
        """Look up the drafts after the known tokens of each batch row.

        Beyond the record (drafts of requests that end in this step) none is accepted.
        """
        k = self._setting.k
        self._tokens = np.full((len(requests), k), REJECTED, dtype=np.int64)
        self._confidence = np.zeros((len(requests), k))
        for i, request in enumerate(requests):
            trace, p = request.trace, request.num_output
            if p < len(trace.accepted):
                num_accepted = min(trace.accepted[p], k)
                accepted = trace.output_ids[p : p + num_accepted]
                self._tokens[i, :num_accepted] = accepted
                self._confidence[i] = trace.confidences[p][:k]

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
        costs = self._setting.costs
        self._ms += costs.draft.at(rows.num_rows)
        self._host_ms += self._setting.launches.at(rows.num_rows)
        if self.returns_confidence:
            self._ms += costs.confidence_ms
            self._ms += costs.deciding_ms * (draft_position == 0)
        requests = rows.row_req_indices[sampled_rows]
        tokens = self._tokens[requests, draft_position]
        return torch.from_numpy(tokens), self._confidence[requests, draft_position]
