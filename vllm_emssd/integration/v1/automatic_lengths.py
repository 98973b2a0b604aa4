"""What forwards cost on the V1 runner, for automatic draft lengths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.integration.costs import (
    CONTEXT,
    FIXED_MS,
    NO_DRAFT_MODEL,
    TIMED_ROWS,
    StepCostMeter,
    measure_drafter,
    rows_to_measure,
    time_target,
)
from vllm_emssd.integration.cpu.row_padding import ROW_COUNTS, RowPadding
from vllm_emssd.integration.forward_clock import ForwardTimer
from vllm_emssd.integration.ranks import Ranks
from vllm_emssd.integration.v1.drafter import PagedDrafter

logger = init_logger("vllm.emssd.automatic_lengths_v1")


def measure_costs(
    runner: CPUModelRunner,
    drafter: PagedDrafter | None,
    computed_rows: Callable[[int], int],
    ranks: Ranks,
) -> tuple[StepCostMeter, RowPadding]:
    """After warm-up, once: it makes the kernels of all row counts too.

    Args:
        computed_rows: see `StepCosts`.
    """
    target = ForwardTimer(runner.model)
    most = runner.max_num_reqs * (1 + runner.num_spec_tokens)

    @torch.inference_mode()
    def run(num_rows: int) -> None:
        hidden_states, _ = runner._dummy_run(
            num_rows,
            force_attention=True,
            uniform_decode=num_rows <= most,
            profile_seq_lens=min(CONTEXT, runner.max_model_len),
        )
        one_each = np.ones(num_rows, dtype=np.int32)
        with runner.maybe_select_dummy_loras(runner.lora_config, one_each):
            runner.model.compute_logits(hidden_states[:num_rows])

    max_rows = rows_to_measure(most, runner.max_num_tokens)
    for num_rows in sorted({*ROW_COUNTS} - {*TIMED_ROWS}):
        if num_rows <= max_rows:
            run(num_rows)
    samples = time_target(run, target, max_rows, runner.device)
    row_padding = RowPadding.measured(samples)
    logger.info("Row counts quicker as larger ones: %s", row_padding)
    draft_costs, confidence_ms = NO_DRAFT_MODEL, 0.0
    if drafter is not None:
        draft_costs, confidence_ms = measure_drafter(drafter, runner.device)
    costs = StepCosts(
        CostTable.from_samples(samples),
        draft_costs,
        FIXED_MS,
        confidence_ms=confidence_ms,
        computed_rows=computed_rows,
    )
    return StepCostMeter(costs, target, drafter, ranks), row_padding
