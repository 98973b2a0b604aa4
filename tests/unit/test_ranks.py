"""Costs of the first rank for all; fingerprints compared; over real process groups."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.integration import ranks as ranks_module
from vllm_emssd.integration.costs import StepCostMeter
from vllm_emssd.integration.ranks import Ranks

NUM_RANKS = 2


def all_gather(mine: torch.Tensor, dim: int) -> torch.Tensor:
    everyones = [torch.empty_like(mine) for _ in range(NUM_RANKS)]
    torch.distributed.all_gather(everyones, mine)
    return torch.cat(everyones, dim)


def join(rank: int, meeting_point: str) -> Ranks:
    torch.distributed.init_process_group(
        "gloo", init_method=meeting_point, rank=rank, world_size=NUM_RANKS
    )
    group = SimpleNamespace(
        world_size=NUM_RANKS,
        is_first_rank=rank == 0,
        ranks=list(range(NUM_RANKS)),
        cpu_group=torch.distributed.group.WORLD,
        all_gather=all_gather,
    )
    ranks_module.get_tp_group = lambda: group
    return Ranks(torch.device("cpu"))


def meter(rank: int, ranks: Ranks) -> StepCostMeter:
    """Of a target whose forwards take the first rank 10 ms, and the second 20."""
    rows = 4 if rank else 20  # a rank may have read fewer times, of fewer rows
    target = SimpleNamespace(take_timings=lambda: [(rows, 10.0 * (rank + 1))])
    target_costs = CostTable([1, 8], [5.0 + rank, 9.0 + rank])
    measured = StepCosts(target_costs, CostTable([1], [0.0]), 4.0)
    made = StepCostMeter(measured, target, None, ranks)
    made.measured.fixed_ms += rank
    made.measured.speculation_ms += 2 * rank
    made.measured.deciding_ms += 3 * rank
    made.measured.confidence_ms += 0.1 * rank
    made._take_over_costs()
    return made


def costs_of(costs: StepCosts) -> list[Any]:
    rest = [costs.fixed_ms, costs.speculation_ms, costs.deciding_ms]
    rest.append(costs.confidence_ms)
    return [costs.target.points, costs.draft.points, *rest]


def error_of(ranks: Ranks, decision: list[int]) -> str:
    try:
        ranks.check_agreement(np.array(decision))
    except RuntimeError as error:
        return str(error)
    return ""


def scenario(rank: int, meeting_point: str, results: Any) -> None:
    ranks = join(rank, meeting_point)
    out: dict[str, Any] = {"first": ranks.of_first([1.5 + rank])}
    m = meter(rank, ranks)
    out["at start"] = costs_of(m.costs)
    for _ in range(63):
        m.step_done(0)
    out["after 63"] = costs_of(m.costs)
    m.step_done(0)
    out["after 64"] = costs_of(m.costs)
    out["own"] = costs_of(m.measured)
    out["errors"] = [error_of(ranks, [3, 0, n]) for n in (1, 2 + rank, 1)]
    results.put((rank, out))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    meeting_point = f"file://{tmp_path_factory.mktemp('ranks') / 'store'}"
    results = context.Queue()
    processes = [
        context.Process(target=scenario, args=(rank, meeting_point, results))
        for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [found[rank] for rank in range(NUM_RANKS)]


def test_the_first_ranks_numbers_count(outcomes: list[dict[str, Any]]) -> None:
    assert [o["first"] for o in outcomes] == [[1.5], [1.5]]
    assert outcomes[0]["at start"] == outcomes[1]["at start"]
    assert outcomes[0]["at start"][0] == [(1, 5.0), (8, 9.0)]


def test_costs_change_at_numbered_steps_only(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        assert outcome["after 63"] == outcome["at start"]
        assert outcome["after 64"] != outcome["at start"]
    assert outcomes[0]["after 64"] == outcomes[1]["after 64"] == outcomes[0]["own"]
    assert outcomes[1]["own"] != outcomes[0]["own"]


def test_every_rank_is_told_of_a_disagreement(outcomes: list[dict[str, Any]]) -> None:
    """And of all decisions that follow: the ranks' histories differ."""
    for outcome in outcomes:
        agreed, *errors = outcome["errors"]
        assert agreed == ""
        assert all('"draft_length": "fixed"' in error for error in errors)
