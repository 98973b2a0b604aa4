"""Automatic draft lengths on the V1 runner: costs, and what can be set in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.logger import init_logger

from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_length import (
    AcceptanceEstimator,
    AutoDraftLength,
    CostTable,
    FixedDraftLength,
    StepCosts,
)
from vllm_emssd.integration.costs import (
    CONTEXT,
    FIXED_MS,
    NO_DRAFT_MODEL,
    StepCostMeter,
    measure_drafter,
    rows_to_measure,
    time_target,
)
from vllm_emssd.integration.cpu.row_padding import ROW_COUNTS, RowPadding
from vllm_emssd.integration.forward_clock import ForwardTimer
from vllm_emssd.integration.ranks import Ranks
from vllm_emssd.integration.v1.drafter import PagedDrafter
from vllm_emssd.proposers.base import Proposer
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.mixed import MixedProposer

logger = init_logger("vllm.emssd.automatic_lengths_v1")


class AutomaticLengthsMixin:
    """The part of `UnpadRunnerMixin` that knows what forwards cost."""

    # vLLM's runner has these, and `UnpadRunnerMixin`
    model: Any
    device: torch.device
    max_num_reqs: int
    max_num_tokens: int
    max_model_len: int
    num_spec_tokens: int
    speculative_config: SpeculativeConfig
    lora_config: Any
    maybe_select_dummy_loras: Any
    emssd_config: EmssdConfig
    paged_drafter: PagedDrafter | None
    _ranks: Ranks
    _proposer: Proposer | None
    _dummy_run: Any
    _make_proposer: Any
    computed_rows: Callable[[int], int]  # of `PaddedRowsMixin`

    _step_costs: StepCostMeter | None  # with automatic lengths
    _automatic: AutoDraftLength | None  # likewise, with a draft model
    _row_padding: RowPadding  # likewise

    def start_automatic_lengths(self) -> None:
        """Measure costs and draft by them from now on: after warm-up, once."""
        if self.emssd_config.draft_length != "auto":
            return
        self._step_costs = self._measure_costs()
        is_sampled = self.speculative_config.draft_sample_method == "probabilistic"
        costs = self._step_costs.costs
        acceptance = AcceptanceEstimator(self.num_spec_tokens)
        self._automatic = AutoDraftLength(costs, acceptance, may_trim=not is_sampled)
        self._proposer = self._make_proposer(self._automatic, costs)

    def fix_draft_length(self, num_draft_tokens: int | None) -> None:
        """See the worker's `emssd_fix_draft_length`."""
        most = self.num_spec_tokens
        if self._automatic is None or not isinstance(
            self._proposer, DraftModelProposer
        ):
            raise ValueError(
                'draft lengths can be fixed while the engine runs with "draft_length": '
                '"auto" and "proposer": "draft_model"'
            )
        if num_draft_tokens is not None and not 0 <= num_draft_tokens <= most:
            raise ValueError(
                f"{num_draft_tokens} drafts: give 0 to {most}, the engine's "
                "num_speculative_tokens, or None for automatic lengths"
            )
        if num_draft_tokens is None:
            self._automatic.forget_drafts()  # what became of them was not observed
            self._proposer.policy = self._automatic
        else:
            self._proposer.policy = FixedDraftLength(num_draft_tokens)

    def use_proposer(self, proposer: str | None) -> None:
        """See the worker's `emssd_use_proposer`."""
        if not isinstance(self._proposer, MixedProposer):
            raise ValueError('only "proposer": "mixed" has proposers to choose from')
        self._proposer.use(proposer)

    def _measure_costs(self) -> StepCostMeter:
        target, drafter = ForwardTimer(self.model), self.paged_drafter
        most = self.max_num_reqs * (1 + self.num_spec_tokens)

        @torch.inference_mode()
        def run(num_rows: int) -> None:
            hidden_states, _ = self._dummy_run(
                num_rows,
                force_attention=True,
                uniform_decode=num_rows <= most,
                profile_seq_lens=min(CONTEXT, self.max_model_len),
            )
            one_each = np.ones(num_rows, dtype=np.int32)
            with self.maybe_select_dummy_loras(self.lora_config, one_each):
                self.model.compute_logits(hidden_states[:num_rows])

        most_rows = rows_to_measure(most, self.max_num_tokens)
        for num_rows in ROW_COUNTS:  # makes their kernels
            if num_rows <= most_rows:
                run(num_rows)
        samples = time_target(run, target, most_rows, self.device)
        self._row_padding = RowPadding(samples)
        logger.info("Row counts quicker as larger ones: %s", self._row_padding)
        target_costs = CostTable.from_samples(samples)
        draft_costs, confidence_ms = NO_DRAFT_MODEL, 0.0
        if drafter is not None:
            draft_costs, confidence_ms = measure_drafter(drafter, self.device)
        costs = StepCosts(
            target_costs, draft_costs, FIXED_MS, 0.0, confidence_ms, self.computed_rows
        )
        return StepCostMeter(costs, target, drafter, self._ranks)

    def costs_now(self) -> dict[str, Any]:
        """See the worker's `emssd_costs`."""
        return {} if self._step_costs is None else self._step_costs.as_dict()
