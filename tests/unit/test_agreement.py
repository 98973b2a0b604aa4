"""Ranks compare what they decided before they act on it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.simulated_acceptance import Loop, auto_policy, prices
from vllm_emssd.draft_length import (
    AgreedDraftLength,
    DraftOpportunity,
    FixedDraftLength,
    StepCosts,
)


def step(num_reqs: int = 2, most: int = 8, missing: int = 1) -> DraftOpportunity:
    return DraftOpportunity(
        [f"r{i}" for i in range(num_reqs)],
        np.ones(num_reqs, dtype=bool),
        np.full(num_reqs, most),
        np.full(num_reqs, missing),
        0,
    )


def rank(
    policy: object = None, costs: StepCosts | None = None
) -> tuple[AgreedDraftLength, list[int]]:
    """A rank's policy, and the fingerprints it put to the others."""
    fingerprints: list[int] = []
    policy = policy or auto_policy(costs or prices(), 8)
    return AgreedDraftLength(policy, fingerprints.append), fingerprints


def test_decisions_are_the_policys_own() -> None:
    bare, compared = (
        Loop(policy, prices(), 4, lambda *_: 0.6, seed=1).run(60)
        for policy in (auto_policy(prices(), 8), rank(auto_policy(prices(), 8))[0])
    )
    assert [s.made for s in bare.steps] == [s.made for s in compared.steps]
    assert [s.verified for s in bare.steps] == [s.verified for s in compared.steps]
    assert rank()[0].needs_confidence
    assert not rank(FixedDraftLength())[0].needs_confidence


def test_same_history_gives_same_fingerprints() -> None:
    def run() -> list[int]:
        agreed, fingerprints = rank()
        Loop(agreed, prices(), 4, lambda *_: 0.6, seed=1).run(60)
        return fingerprints

    fingerprints = run()
    assert fingerprints == run()
    assert len(set(fingerprints)) > 60


@pytest.mark.parametrize("what", ["accepted", "drafted", "missing", "trimmed"])
def test_other_history_shows_at_the_next_decision(what: str) -> None:
    def run(differs: bool) -> list[int]:
        agreed, fingerprints = rank(FixedDraftLength())
        agreed.begin(step(missing=2 if differs and what == "missing" else 1))
        agreed.finish(np.array([8, 7 if differs and what == "trimmed" else 8]))
        drafted = 7 if differs and what == "drafted" else 8
        agreed.observe("r0", drafted, 1 if differs and what == "accepted" else 2)
        agreed.begin(step())
        return fingerprints

    same, other = run(False), run(True)
    assert same == run(False)
    assert same[-1] != other[-1]


@pytest.mark.parametrize(
    ("policy", "compared_forwards"), [(FixedDraftLength(), 0), (None, 3)]
)
def test_compared_before_each_forward_that_lengths_depend_on(
    policy: object, compared_forwards: int
) -> None:
    agreed, fingerprints = rank(policy)
    agreed.begin(step())
    assert len(fingerprints) == 1
    for position in range(3):
        agreed.go_on(np.arange(2), np.array([0.9, 0.8]), position)
    assert len(fingerprints) == 1 + compared_forwards


def test_other_prices_show_before_the_forward() -> None:
    (cheap, cheap_seen), (dear, dear_seen) = (
        rank(costs=prices(draft_ms=ms)) for ms in (0.1, 1000.0)
    )
    assert cheap.begin(step()).any()
    assert not dear.begin(step()).any()
    assert cheap_seen != dear_seen


def test_copies_are_compared_too() -> None:
    agreed, fingerprints = rank()
    agreed.choose(step(), np.full((2, 8), 0.9))
    assert len(fingerprints) == 1


def test_disagreement_stops_before_the_decision_is_acted_on() -> None:
    def disagree(fingerprint: int) -> None:
        raise RuntimeError("ranks disagree")

    agreed = AgreedDraftLength(FixedDraftLength(), disagree)
    with pytest.raises(RuntimeError, match="ranks disagree"):
        agreed.begin(step())
