"""Automatic lengths set aside, and taken up again, while requests run."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.simulated_acceptance import auto_policy, prices
from vllm_emssd.draft_length import DraftOpportunity, OverridableDraftLength

NUM_REQS, MOST = 3, 8


def opportunity() -> DraftOpportunity:
    most = np.array([0, 2, MOST])
    ones = np.ones(NUM_REQS, dtype=np.int64)
    return DraftOpportunity(["a", "b", "c"], ones > 0, most, ones, 0)


@pytest.fixture
def policy() -> OverridableDraftLength:
    return OverridableDraftLength(auto_policy(prices(draft_ms=1.0), MOST))


@pytest.mark.parametrize(
    ("fixed", "drafts"), [(0, [0, 0, 0]), (1, [0, 1, 1]), (5, [0, 2, 5])]
)
def test_all_draft_as_many_as_was_set(
    policy: OverridableDraftLength, fixed: int, drafts: list[int]
) -> None:
    policy.fix(fixed)
    assert policy.rests(NUM_REQS) == (fixed == 0)
    assert policy.feeds_prompts == (fixed > 0)
    assert policy.begin(opportunity()).tolist() == drafts
    assert policy.go_on(np.array([1, 2]), np.zeros(2), 0).all()
    assert policy.finish(np.array(drafts)).tolist() == drafts


def test_automatic_lengths_go_on_where_they_were(
    policy: OverridableDraftLength,
) -> None:
    """Drafts that they did not ask for teach them nothing of drafts; ended requests
    leave nothing."""
    automatic = auto_policy(prices(draft_ms=1.0), MOST)
    policy.fix(4)
    for _ in range(50):
        policy.begin(opportunity())
        for req_id in "abc":
            policy.observe(req_id, 4, 0)
    for req_id in "abc":
        policy.release(req_id)
    policy.fix(None)
    assert not policy.rests(NUM_REQS)
    assert policy.feeds_prompts
    assert policy.begin(opportunity()).tolist() == [0, 2, MOST]
    assert (
        policy.begin(opportunity()).tolist() == automatic.begin(opportunity()).tolist()
    )
    sure, unsure = np.array([0.99]), np.array([0.001])
    assert policy.go_on(np.array([2]), sure, 0).all()
    assert not policy.go_on(np.array([2]), unsure, 1).any()
    assert policy.finish(np.array([0, 0, 2])).tolist() == [0, 0, 1]
