"""How many drafts vLLM's adaptive verification admits by the costs that we give it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vllm_emssd.integration.cpu.worker  # noqa: F401  before vLLM's V2 runner
from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.integration.v2.runner import UnpadGPUModelRunnerV2

K, NUM_REQS = 4, 6
BY_EIGHT = [-(-n // 8) * 8 for n in range(65)]  # rows computed with CUDA graphs
COSTS = StepCosts(
    CostTable([8, 64], [4.0, 11.0], BY_EIGHT), CostTable([1], [0.5]), 1.0, 0.5
)


def admitted(costs: StepCosts | None, confidences: np.ndarray, made: list[int]) -> int:
    """Of drafts that requests made, by vLLM's manager. `confidences`: [NUM_REQS, K]."""
    from vllm.v1.worker.gpu.spec_decode.adaptive_verification import (
        AdaptiveVerificationManager,
    )

    manager = object.__new__(AdaptiveVerificationManager)
    req_ids = [str(i) for i in range(len(made))]
    manager.req_states = SimpleNamespace(  # type: ignore[assignment]
        req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
        num_computed_tokens_np=np.full(len(made), 50),
        prefill_len=SimpleNamespace(np=np.full(len(made), 50)),
    )
    manager.num_speculative_steps, manager.num_bonus_tokens = K, 1
    manager._max_total_logits, manager._stale_idx = 10_000, 0
    manager._stale_confidences = [SimpleNamespace(np=confidences)]  # type: ignore[list-item]
    free = np.zeros(99), np.full(999, 1e-6)
    manager.cost_tables = free
    drafts = {r: [-1] * n for r, n in zip(req_ids, made, strict=True) if n}
    num_rows = {r: 1 + n for r, n in zip(req_ids, made, strict=True)}
    output: Any = SimpleNamespace(
        scheduled_spec_decode_tokens=drafts,
        num_scheduled_tokens=num_rows,
        total_num_scheduled_tokens=sum(num_rows.values()),
    )
    meter = None if costs is None else SimpleNamespace(costs=costs)
    runner: Any = SimpleNamespace(adaptive_verification=manager, step_costs=meter)
    UnpadGPUModelRunnerV2._set_verification_costs(runner, output)
    assert (manager.cost_tables is free) == (costs is None or not drafts)
    return manager.get_num_tokens(num_rows, drafts) - len(made)


def best(confidences: np.ndarray, made: list[int]) -> int:
    """By trying every number."""
    survival = confidences.cumprod(axis=1)
    kept = np.concatenate([survival[i, :n] for i, n in enumerate(made)])
    tokens = len(made) + np.cumsum([0, *sorted(kept, reverse=True)])
    ms = [
        1.5 + max(made) * 0.5 + COSTS.target.at(len(made) + n)
        for n in range(sum(made) + 1)
    ]
    return int((tokens / ms).argmax())


@pytest.mark.parametrize("made", [[K] * NUM_REQS, [K, 0, 1, K, 2, 3], [1] * NUM_REQS])
@pytest.mark.parametrize("seed", range(8))
def test_as_many_as_earn_most_by_our_costs(made: list[int], seed: int) -> None:
    confidences = np.random.default_rng(seed).uniform(0.1, 1.0, (NUM_REQS, K))
    assert admitted(COSTS, confidences, made) == best(confidences, made)


def test_rows_that_would_be_padding_are_filled() -> None:
    """Six requests and two drafts are eight rows."""
    assert admitted(COSTS, np.full((NUM_REQS, K), 0.01), [K] * NUM_REQS) == 2


def test_what_drafts_cost_depends_on_how_many_were_made() -> None:
    """Where making them took long, more are worth verifying."""
    slow = StepCosts(COSTS.target, CostTable([1], [9.0]), 1.0)
    confidences = np.linspace(0.2, 0.6, NUM_REQS * K).reshape(NUM_REQS, K)
    few = admitted(COSTS, confidences, [K] * NUM_REQS)
    assert few < admitted(slow, confidences, [K] * NUM_REQS)


def test_fixed_lengths_and_steps_without_drafts_leave_vllms_costs() -> None:
    confidences = np.full((NUM_REQS, K), 0.5)
    assert admitted(None, confidences, [K] * NUM_REQS) == K * NUM_REQS
    assert admitted(COSTS, confidences, [0] * NUM_REQS) == 0
