"""Copies under all a scheduler may do: preempted, aborted, left out, ids used again."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.draft_batches import batch_of
from tests.unit.proposing_engine import PlannedFailureError, ProposingEngine
from tests.unit.simulated_scheduler import Request, Setup
from tests.unit.test_draft_model import setups
from vllm_emssd.draft_length import StepInfo
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.copy_lengths import LengthsByAcceptance
from vllm_emssd.proposers.llma import LlmaProposer


class FailsAtTimes(LengthsByAcceptance):
    def __init__(self, rng: random.Random, chance: float) -> None:
        super().__init__()
        self._rng, self._chance = rng, chance

    def choose(self, step: StepInfo, acceptance: np.ndarray) -> np.ndarray:
        if self._rng.random() < self._chance:
            raise PlannedFailureError
        return super().choose(step, acceptance)


class CopyEngine(ProposingEngine):
    """Beside the proposer, one for each request alone, which knows of no batch, no
    pause and no other request."""

    def __init__(self, setup: Setup, check_length: int, copy_length: int) -> None:
        lengths = FailsAtTimes(random.Random(setup.seed), setup.failure_chance)
        super().__init__(setup, LlmaProposer(check_length, copy_length, lengths))
        self._check_length, self._copy_length = check_length, copy_length
        self._alone: dict[Request, LlmaProposer] = {}

    def _record(self, request: Request, *verified: int) -> None:
        super()._record(request, *verified)
        self._alone_of(request).record_verified(request.req_id, *verified)

    def _propose(self, requests: list[Request], batch: DraftBatch) -> list[list[int]]:
        assert set(self._proposer._requests) <= self._scheduler.known_req_ids
        expected = self._found_alone(requests, batch)
        try:
            drafts = super()._propose(requests, batch)
        except PlannedFailureError:
            self.seen["failed"] += 1
            return [[] for _ in requests]
        assert drafts == expected
        self.seen["copied"] += sum(map(bool, drafts))
        return drafts

    def _alone_of(self, request: Request) -> LlmaProposer:
        alone = LlmaProposer(
            self._check_length, self._copy_length, LengthsByAcceptance()
        )
        return self._alone.setdefault(request, alone)

    def _found_alone(
        self, requests: list[Request], batch: DraftBatch
    ) -> list[list[int]]:
        found = []
        for i, request in enumerate(requests):
            alone = batch_of(
                {request.req_id: request.tokens},
                batch.max_draft_tokens[i : i + 1],
                batch.is_sampling[i : i + 1],
                num_prompt_tokens=[request.num_prompt_tokens],
            )
            found += self._alone_of(request).propose(alone)
        return found


@st.composite
def engines(draw: st.DrawFn) -> CopyEngine:
    setup = dataclasses.replace(draw(setups()), max_model_len=draw(st.integers(5, 70)))
    return CopyEngine(setup, draw(st.integers(1, 4)), draw(st.integers(1, 9)))


def guess(self: Any, kind: Any, match_len: int) -> float:
    return match_len / (match_len + 1)


@pytest.fixture(scope="module", autouse=True)
def others_do_not_matter() -> Iterator[None]:
    """Else what is copied depends on how other requests' copies fared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlmaProposer, "_acceptance", guess)
        patch.setattr("vllm_emssd.proposers.llma._WORTHLESS", 0.0)
        yield


@settings(max_examples=100, deadline=None, derandomize=True)
@given(engines())
def test_copies_what_each_request_would_alone(engine: CopyEngine) -> None:
    engine.run()


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(engines())
def test_copies_what_each_request_would_alone_in_thousands_of_cases(
    engine: CopyEngine,
) -> None:
    engine.run()


def test_simulation_visits_what_it_claims() -> None:
    seen: Counter[str] = Counter()
    for seed in range(20):
        setup = Setup(seed, max_model_len=64, failure_chance=0.1)
        seen += CopyEngine(setup, 1, 7).run()
    for what in ("copied", "failed", "resumed", "aborted"):
        assert seen[what] >= 20, what
