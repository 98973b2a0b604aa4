"""Copies and drafts side by side: the drafter is fed what it must be, no more."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests.unit.draft_batches import batch_of
from tests.unit.scripted_target import replay
from tests.unit.simulated_scheduler import Setup
from tests.unit.simulated_worker import Engine
from tests.unit.test_draft_model import SEEDS, setups
from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor
from vllm_emssd.draft_length import (
    CostTable,
    DraftLengthPolicy,
    StepCosts,
    StepInfo,
)
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.copy_lengths import LengthsByAcceptance
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.llma import NO_COPY, Copy, LlmaProposer
from vllm_emssd.proposers.mixed import MixedProposer
from vllm_emssd.ragged import RaggedRows


class SpiedCopying(LlmaProposer):
    """Copies now and then only, and keeps what it proposed and was told."""

    rng: random.Random

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drafts: list[list[int]] = []  # were none to draft
        self.verified: list[tuple[str, int, int]] = []

    def find(self, batch: DraftBatch) -> list[Copy]:
        copies = super().find(batch)
        return [c if self.rng.random() < 0.6 else NO_COPY for c in copies]

    def choose(self, batch: DraftBatch, copies: list[Copy]) -> list[list[int]]:
        drafts = super().choose(batch, copies)
        self.drafts = drafts
        return drafts

    def record_verified(self, *verified: Any) -> None:
        self.verified.append(verified)
        super().record_verified(*verified)


class MixedEngine(Engine):
    """The simulated deployment with the mixed proposer: half of the requests bring a
    reference. What is copied is not drafted; all else is as with the model alone."""

    make_mixed: type[MixedProposer] = MixedProposer

    def _make_proposer(self, policy: DraftLengthPolicy) -> MixedProposer:
        setup = self._setup
        self._copying = SpiedCopying(2, setup.num_spec_tokens, LengthsByAcceptance())
        self._copying.rng = random.Random(setup.seed)
        drafting = super()._make_proposer(policy)
        propose = drafting.propose

        def note(told: DraftBatch) -> list[list[int]]:
            self._told, self._made = told, propose(told)
            return self._made

        drafting.propose = note
        return self.make_mixed(
            self._copying, drafting, setup.num_spec_tokens, setup.seed % 2 == 0
        )

    def _update_blocks(self, schedule: Any) -> None:
        super()._update_blocks(schedule)
        for request in schedule.admitted:
            if self._copying.rng.random() < 0.5:
                token_ids = np.array(request.tokens[::-1] * 3, dtype=np.int32)
                self._proposer.add_reference(request.req_id, token_ids)

    def _check_observed(self, verified: list[tuple[str, int, int]]) -> None:
        """Each proposer is told of its own drafts, and of the other's that its own were
        not used. Of steps without drafts it does not matter which."""
        copying, policy = self._copying, self._policy
        copied = [v for v in verified if v[1] and v[0] in self._has_copied]
        drafted = [v for v in verified if v[1] and v[0] not in self._has_copied]
        req_ids = sorted(v[0] for v in verified)
        assert [v for v in copying.verified if v[1]] == copied
        assert sorted(v[0] for v in copying.verified) == req_ids
        assert [v for v in policy.observed if v[1]] == drafted
        assert sorted(v[0] for v in policy.observed) == req_ids
        policy.observed, copying.verified = [], []

    _has_copied: frozenset[str] = frozenset()

    def _check_drafts(
        self, batch: DraftBatch, drafts: list[list[int]], num_cached: list[int]
    ) -> None:
        could, skips = self._copying.drafts, self._policy.step is None
        if skips:
            self._told = dataclasses.replace(
                batch, max_draft_tokens=0 * batch.num_tokens
            )
            self._made = [[] for _ in could]
        made, told, requests = self._made, self._told, self._requests
        copied = [[] if m else c for m, c in zip(made, could, strict=True)]
        assert drafts == [m or c for m, c in zip(made, could, strict=True)]
        assert skips or told.copies.rows.tolist() == list(map(len, could))
        for i in np.flatnonzero([len(c) > 0 for c in copied]):
            self._seen["copied"] += 1
            self._seen["copied, as drafting came to nothing"] += (
                not skips and self._policy.asked[i] > 0
            )
            self._seen["copied while drafting was skipped"] += skips
            self._seen["copied while others drafted"] += any(made)
            self._seen["copied, cursor behind"] += (
                len(requests[i].tokens) - num_cached[i] > 2
            )
        has_drafted = [r.has_drafted for r in requests]
        if skips:
            self._check_skipped(num_cached)
        else:
            super()._check_drafts(told, made, num_cached)
        self._forget_fed_drafts(copied)
        for request, copy, drafted in zip(requests, copied, has_drafted, strict=True):
            if copy:
                request.drafts, request.has_drafted = copy, False
                self._seen["copied after drafting"] += drafted
        now = {r.req_id for r, c in zip(requests, copied, strict=True) if c}
        gone = {r.req_id for r in requests} - now
        self._has_copied = (self._has_copied - gone) | now

    def _check_skipped(self, num_cached: list[int]) -> None:
        """Nothing is fed, nothing moves."""
        assert self.drafter.fed == []
        for request, before in zip(self._requests, num_cached, strict=True):
            assert self._cursor.draft_len(request.req_id) == before
            assert self._kv.num_cached(request) == before
            request.drafts, request.has_drafted = [], False

    def _forget_fed_drafts(self, copied: list[list[int]]) -> None:
        """Drafts that were fed, then trimmed, and a copy verified instead: their rows
        do not count, though the copy may say the same."""
        for forward in self.drafter.fed:
            for i, positions in forward:
                known = len(self._requests[i].tokens)
                for position in positions if copied[i] else ():
                    if position >= known:
                        self._kv.forget_fed(self._requests[i], position)


def run_all_seeds(mixed: type[MixedProposer] = MixedProposer) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        engine = type("Engine", (MixedEngine,), {"make_mixed": mixed})(Setup(seed))
        seen += engine.run()
    return seen


@settings(max_examples=150, deadline=None, derandomize=True)
@given(setups())
def test_equals_naive_drafter_where_it_does_not_copy(setup: Setup) -> None:
    MixedEngine(setup).run()


def test_simulation_visits_what_it_claims() -> None:
    seen = run_all_seeds()
    for event in (
        "copied",
        "copied after drafting",
        "copied while others drafted",
        "copied, cursor behind",
        "copied, as drafting came to nothing",
        "copied while drafting was skipped",
        "backfilled",
        "drafted twice running",
        "left out with drafts pending",
        "preempted",
        "resumed",
    ):
        assert seen[event] >= 20, event


class TellsTheDrafterOfCopies(MixedProposer):
    def record_verified(self, req_id: str, *verified: int) -> None:
        self._copied.discard(req_id)
        super().record_verified(req_id, *verified)


class TellsCopiesOfDrafts(MixedProposer):
    def record_verified(self, req_id: str, *verified: int) -> None:
        self._copied.add(req_id)
        super().record_verified(req_id, *verified)


class CopiesBesideDrafts(MixedProposer):
    def _note_copies(self, batch: DraftBatch, copies: list[list[int]]) -> None:
        super()._note_copies(batch, self._copying.drafts)


@pytest.mark.parametrize(
    "broken", [TellsTheDrafterOfCopies, TellsCopiesOfDrafts, CopiesBesideDrafts]
)
def test_simulation_catches_planted_error(broken: type[MixedProposer]) -> None:
    with pytest.raises(AssertionError):
        run_all_seeds(broken)


# ---------------------------------------------------------------- which of the two


class OracleDrafter:
    """Drafts 1, 2, 3, ...; counts its rows."""

    max_num_rows = max_model_len = 4096

    def __init__(self) -> None:
        self.num_rows = 0

    def forward(self, rows: RaggedRows, token_ids: Any, sampled_rows: Any, _: int):
        self.num_rows += rows.num_rows
        last = torch.as_tensor(token_ids)[torch.from_numpy(sampled_rows)]
        return last.long() + 1, None


def mixed_of_one(
    reference: list[int] | None, copy_length: int = 7
) -> tuple[MixedProposer, OracleDrafter]:
    cursor = DraftCursor(num_blocks=512, block_size=8)
    cursor.update_blocks([AdmittedRequest("r", range(512), 0)], [])
    drafter, fixed = OracleDrafter(), DraftLengthPolicy()
    copying = LlmaProposer(2, copy_length, LengthsByAcceptance())
    if reference is not None:
        copying.add_reference("r", np.array(reference, dtype=np.int32))
    drafting = DraftModelProposer(drafter, cursor, fixed, Counters())
    return MixedProposer(copying, drafting, 4), drafter


COUNTING = list(range(2000, 2400))  # the drafter is always right
SQUARES = [n * n for n in range(400)]  # and always wrong


def test_right_reference_costs_the_drafter_nothing() -> None:
    proposer, drafter = mixed_of_one(SQUARES, copy_length=15)
    seen = replay(proposer, [1], SQUARES, 15)
    assert seen.num_forwards == 25
    assert drafter.num_rows == 0


def test_wrong_reference_leaves_the_drafter_its_work() -> None:
    proposer, _ = mixed_of_one(SQUARES)
    alone, _ = mixed_of_one(None)
    best = replay(alone, [1], COUNTING, 7)
    assert best.num_forwards == -(-399 // 5)
    assert replay(proposer, [1], COUNTING, 7).num_forwards <= best.num_forwards + 8


def test_changes_to_whichever_fares_better() -> None:
    """The reference holds for the first half, drafts for the second."""
    answer = [*SQUARES, *COUNTING]
    proposer, drafter = mixed_of_one(SQUARES)
    seen = replay(proposer, [1], answer, 7)
    assert seen.num_forwards <= 400 / 8 + 400 / 5 + 8
    assert 0 < drafter.num_rows <= len(answer) + 4 * 400 / 5 + 40


@pytest.mark.parametrize("can_copy", [True, False])
def test_drafts_that_did_badly_are_tried_again(can_copy: bool) -> None:
    """While copies look better the record of drafts fades; else it stays."""
    proposer, drafter = mixed_of_one(None, copy_length=3)
    for _ in range(100):
        proposer._drafts.record.observe(4, 0, keep=0.99)
    before = proposer._drafts.record.tested
    tokens = [5, 6, 7, 8, 5, 6] if can_copy else [5, 6, 7, 8, 9, 1]
    proposer.propose(batch_of({"r": tokens}, [4], num_prompt_tokens=[4]))
    assert (drafter.num_rows == 0) == can_copy
    assert (proposer._drafts.record.tested < before) == can_copy


def test_the_drafting_policy_is_told_what_copies_will_bring() -> None:
    """Else it takes time to be cheap, and drafts where that slows copies down."""
    copying, drafting = [5, 6, 7, 8, 5, 6], [1, 2, 3, 4, 9, 10]
    proposer, _ = mixed_of_one(None, copy_length=3)
    proposer._weighs_copies = True
    told = []

    def plan(step: StepInfo) -> np.ndarray:
        told.append(step)
        return np.array([0, 2])

    proposer._drafting.policy.plan = plan
    cursor = proposer._drafting._cursor
    cursor.update_blocks([AdmittedRequest("s", range(512), 0)], [])
    batch = batch_of({"r": copying, "s": drafting}, [4, 4], num_prompt_tokens=[4, 4])
    drafts = proposer.propose(batch)
    assert drafts == [[7, 8, 5], [11, 12]]
    [step] = told
    assert step.max_draft_tokens.tolist() == [4, 4], "either may draft"
    assert step.copies.rows.tolist() == [3, 0]
    assert 0 < step.copies.gains[0] < 3
    assert step.copies.gains[1] == 0
    assert step.base_rows == 2


def test_the_model_alone_skips_steps_too() -> None:
    proposer, _ = mixed_of_one(None)
    proposer.only = "draft_model"
    proposer._drafting.policy.skips_step = lambda num_sampling: True
    assert proposer.propose(batch_of({"r": [5, 6, 7, 8, 5, 6]}, [4])) == [[]]


def test_a_step_asks_once_how_much_is_copied_and_once_what_is_drafted() -> None:
    """Idle steps would count double, and a probe could be lost."""
    costs = StepCosts(CostTable([1], [10.0]), CostTable([1], [1.0]), 1.0)
    proposer, _ = mixed_of_one(None, copy_length=3)
    asked = Counter()

    def counted(name: str, ask: Any) -> Any:
        def call(*args: Any) -> Any:
            asked[name] += 1
            return ask(*args)

        return call

    lengths = proposer._copying._lengths = LengthsByAcceptance(costs)
    policy = proposer._drafting.policy
    lengths.choose = counted("copies", lengths.choose)
    policy.skips_step = counted("skips", policy.skips_step)
    policy.plan = counted("drafts", policy.plan)
    for step in range(1, 6):
        batch = batch_of({"r": [5, 6, 7, 8, 5, 6]}, [4], num_prompt_tokens=[4])
        proposer.propose(batch)
        proposer.record_verified("r", 0, 0)
        assert asked == {"copies": step, "skips": step, "drafts": step}


class ChangesItsMind(MixedProposer):
    """Another proposer each step; a drafter left out is fed what it missed."""

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        self._steps = getattr(self, "_steps", 0) + 1
        self.only = (None, "llma", "draft_model")[self._steps % 3]
        return super().propose(batch)


def test_changing_proposers_keeps_the_text() -> None:
    answer = [*SQUARES[:80], *COUNTING[:80]]
    proposer, drafter = mixed_of_one(SQUARES)
    changing = ChangesItsMind(proposer._copying, proposer._drafting, 4)
    seen = replay(changing, [1], answer, 7)
    assert seen.num_forwards < len(answer)
    assert drafter.num_rows > 0


@pytest.mark.parametrize("num_requests", [1, 64])
def test_the_record_of_drafts_fades_once_a_step(num_requests: int) -> None:
    proposer, _ = mixed_of_one(None)
    for _ in range(200):
        proposer.propose(batch_of({"r": [1]}, [0]))
        for _ in range(num_requests):
            proposer.record_verified("r", 4, 4)
    weights = sum(0.99**i for i in range(200))
    assert proposer._drafts.record.tested == pytest.approx(4 * num_requests * weights)


def test_without_costs_missing_rows_and_failed_drafts_speak_for_the_copy() -> None:
    proposer, _ = mixed_of_one(None)

    def gain(num_tokens: int) -> float:
        batch = batch_of({"r": [1] * num_tokens}, [4])
        missing = proposer._drafting.missing_rows(batch)
        [gain] = proposer._drafts.gains(np.array([4]), missing)
        return gain

    at_first = gain(2)
    assert gain(1500) == pytest.approx(at_first - 1.498)
    for _ in range(20):
        proposer.record_verified("r", 4, 0)
    assert gain(2) < at_first / 4
