"""Automatic lengths whose predictions are counted."""

from __future__ import annotations

import numpy as np

from tests.unit.simulated_acceptance import made_costs
from vllm_emssd.draft_length import StepInfo
from vllm_emssd.simulate.reliability import MARGINAL, CountedDraftLength


def test_counts_verified_drafts_by_what_was_predicted() -> None:
    policy = CountedDraftLength(made_costs(), 3, may_trim=False)
    ones = np.ones(1, dtype=np.int64)
    policy.plan(StepInfo(["a"], ones > 0, 3 * ones, ones, 0))
    policy.continue_drafting(np.array([0]), np.array([0.5]), 0)
    policy._survival[0] = 1.0, 0.55, 0.1
    policy._verify_cost = 0.5
    policy.trim(np.array([3]))
    policy.observe("a", 2, 1)
    policy.observe("a", 2, 1)  # verified only once
    number, predicted, accepted, cost = policy.reliability
    assert number[[9, 5, 1, MARGINAL]].tolist() == [1, 1, 0, 1]
    assert number.sum() == 3
    assert predicted[[9, 5, MARGINAL]].tolist() == [1.0, 0.55, 0.55]
    assert accepted[[9, 5, MARGINAL]].tolist() == [1, 0, 0]
    assert cost[MARGINAL] == 0.5
