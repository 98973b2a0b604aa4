"""Automatic draft lengths on the V1 runner: costs, and what can be set in a run."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import SpeculativeConfig
from vllm.logger import init_logger

from vllm_emssd.config import EmssdConfig
from vllm_emssd.draft_length import (
    AutoDraftLength,
    CostTable,
    OverridableDraftLength,
    Survival,
)
from vllm_emssd.integration.forward_clock import ForwardTimer
from vllm_emssd.integration.paged_drafter import PagedDrafter
from vllm_emssd.integration.ranks import Ranks
from vllm_emssd.integration.row_rounding import RowRounding
from vllm_emssd.integration.step_costs import (
    CONTEXT,
    NO_DRAFT_MODEL,
    StepCostMeter,
    measure_drafter,
    rows_to_measure,
    time_target,
)
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
    emssd_config: EmssdConfig
    paged_drafter: PagedDrafter | None
    _ranks: Ranks
    _proposer: Proposer | None
    _dummy_run: Any
    _make_proposer: Any

    _step_costs: StepCostMeter | None  # with automatic lengths
    _drafting_policy: OverridableDraftLength | None  # likewise
    _row_rounding: RowRounding  # likewise

    def start_automatic_lengths(self) -> None:
        """Measure costs and draft by them from now on: after warm-up, once."""
        if self.emssd_config.draft_length != "auto":
            return
        self._step_costs = self._measure_costs()
        is_sampled = self.speculative_config.draft_sample_method == "probabilistic"
        costs = self._step_costs.costs
        automatic = AutoDraftLength(
            costs, Survival(self.num_spec_tokens), may_trim=not is_sampled
        )
        drafting = self._drafting_policy = OverridableDraftLength(automatic)
        copying = AutoDraftLength(costs, Survival(self.num_spec_tokens), may_trim=True)
        self._proposer = self._make_proposer(drafting, copying, weighs_copies=True)

    def fix_draft_length(self, num_draft_tokens: int | None) -> None:
        """See the worker's `emssd_fix_draft_length`."""
        most = self.num_spec_tokens
        if self._drafting_policy is None or not isinstance(
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
        self._drafting_policy.fix(num_draft_tokens)

    def use_proposer(self, proposer: str | None) -> None:
        """See the worker's `emssd_use_proposer`."""
        if not isinstance(self._proposer, MixedProposer):
            raise ValueError('only "proposer": "mixed" has proposers to choose from')
        self._proposer.use(proposer)

    def _measure_costs(self) -> StepCostMeter:
        target, drafter = ForwardTimer(self.model), self.paged_drafter
        most = self.max_num_reqs * (1 + self.num_spec_tokens)
        timed = time_target(
            lambda num_rows: self._dummy_run(
                num_rows,
                force_attention=True,
                uniform_decode=num_rows <= most,
                profile_seq_lens=min(CONTEXT, self.max_model_len),
            ),
            target,
            rows_to_measure(most, self.max_num_tokens),
            self.device,
        )
        self._row_rounding = RowRounding(timed.samples, timed.preparing_ms)
        logger.info("Row counts quicker as larger ones: %s", self._row_rounding)
        target_costs = CostTable.from_samples(timed.samples)
        draft_costs = (
            NO_DRAFT_MODEL if drafter is None else measure_drafter(drafter, self.device)
        )
        return StepCostMeter((target_costs, draft_costs), target, drafter, self._ranks)

    def costs_now(self) -> dict[str, Any]:
        """See the worker's `emssd_costs`."""
        return {} if self._step_costs is None else self._step_costs.prices()
