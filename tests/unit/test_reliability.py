"""Automatic lengths whose predictions are counted."""

from __future__ import annotations

import numpy as np

from tests.unit.simulated_acceptance import made_costs
from vllm_emssd.draft_length import StepInfo
from vllm_emssd.simulate.reliability import AT_STOP, AT_TRIM, CountedDraftLength


def test_counts_drafts_by_what_was_predicted() -> None:
    """Verified or not, as all are made: here two, of which the first is accepted."""
    policy = CountedDraftLength(
        made_costs(), 3, may_trim=False, num_accepted={"a": 1}.__getitem__
    )
    ones = np.ones(1, dtype=np.int64)
    policy.plan(StepInfo(["a"], ones > 0, 3 * ones, ones, 0))
    policy.continue_drafting(np.array([0]), np.array([0.5]), 0)
    policy._survival[0] = 1.0, 0.55, 0.0
    policy._verify_cost, policy._draft_cost = 0.5, 0.9
    policy.acceptance.by_depth = np.array([0.9, 0.8, 0.5])
    policy.trim(np.array([2]))
    number, predicted, accepted, cost = policy.reliability
    assert number[[9, 5, AT_TRIM, AT_STOP]].tolist() == [1, 1, 1, 1]
    assert number.sum() == 4
    assert predicted[[9, 5, AT_TRIM, AT_STOP]].tolist() == [1.0, 0.55, 0.55, 0.8]
    assert accepted[[9, 5, AT_TRIM, AT_STOP]].tolist() == [1, 0, 0, 0]
    assert cost[[AT_TRIM, AT_STOP]].tolist() == [0.5, 0.9]
