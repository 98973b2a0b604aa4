"""The draft-model proposer against a naive drafter, under all a scheduler may do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit import simulated_worker
from tests.unit.draft_batches import batch_of
from tests.unit.simulated_scheduler import Setup
from tests.unit.simulated_worker import Engine, RandomLengths
from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor
from vllm_emssd.draft_length import DraftLengthPolicy, FixedDraftLength
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.ragged import RaggedRows

SEEDS = range(30)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    max_model_len = draw(st.integers(5, 40))
    return Setup(
        seed=draw(st.integers(0, 2**32 - 1)),
        num_steps=draw(st.integers(1, 50)),
        max_num_reqs=draw(st.integers(1, 6)),
        num_spec_tokens=draw(st.integers(1, 6)),
        block_size=draw(st.integers(1, 5)),
        num_spare_blocks=draw(st.integers(0, 20)),
        max_model_len=max_model_len,
        drafter_max_model_len=draw(st.integers(1, max_model_len)),
        token_budget=draw(st.integers(1, 40)),
        max_num_rows=draw(st.integers(1, 40)),
        trust_cached_blocks=draw(st.booleans()),
        drafts_always=draw(st.booleans()),
        returns_confidence=draw(st.booleans()),
        failure_chance=draw(st.sampled_from((0.0, 0.0, 0.1, 0.5))),
    )


@settings(max_examples=250, deadline=None, derandomize=True)
@given(setups())
def test_equals_naive_drafter(setup: Setup) -> None:
    Engine(setup).run()


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(setups())
def test_equals_naive_drafter_in_thousands_of_cases(setup: Setup) -> None:
    Engine(setup).run()


def test_simulation_visits_what_it_claims() -> None:
    seen = run_all_seeds(DraftCursor) + run_all_seeds(DraftCursor, failure_chance=0.1)
    assert set(seen) == {
        "aborted",
        "cache hit, not whole",
        "cache hit, whole",
        "backfill chunked",
        "backfilled",
        "filled by another",
        "drafted twice running",
        "drafts trimmed",
        "failed at once",
        "failed in mid-draft",
        "left out with drafts pending",
        "observing failed",
        "paused",
        "preempted",
        "prefill chunked",
        "prompt put off",
        "reached max_model_len",
        "resumed",
        "stopped in mid-draft",
        "trimmed by the policy",
        "waited for another",
    }
    assert min(seen.values()) >= 20


class CountsUnfedDrafts(DraftCursor):
    """The last draft is proposed, but never fed: here it counts all the same."""

    def record_verified(self, req_id: str, num_accepted_tokens: int) -> None:
        self.record_fed_drafts(req_id, num_accepted_tokens)
        super().record_verified(req_id, num_accepted_tokens)


class ForgetsAcceptedDrafts(DraftCursor):
    def record_verified(self, req_id: str, num_accepted_tokens: int) -> None:
        super().record_verified(req_id, 0)


class KeepsReallocatedBlocksValid(DraftCursor):
    def _clear(self, block_ids: Sequence[int]) -> None:
        pass


class TrustsEveryHit(DraftCursor):
    def draft_len(self, req_id: str) -> int:
        state = self._requests[req_id]
        hit_len = state.num_hit_blocks * self._block_size
        state.draft_len = max(state.draft_len, hit_len)
        return state.draft_len


class TrustsNoHit(DraftCursor):
    def draft_len(self, req_id: str) -> int:
        return self._requests[req_id].draft_len


class LooksUpBeforeAllAreCleared(DraftCursor):
    """Takes in one request after the other, so an early one sees stale blocks."""

    def update_blocks(
        self,
        admitted: Iterable[AdmittedRequest],
        extended: Iterable[tuple[str, Sequence[int]]],
    ) -> None:
        for request in reversed(list(admitted)):
            super().update_blocks([request], [])
            self.draft_len(request.req_id)
        super().update_blocks([], extended)


class LooksUpAtAdmissionOnly(DraftCursor):
    """What others made whole since then is fed once more."""

    def update_blocks(self, *allocations: Any) -> None:
        allocations = tuple(map(list, allocations))
        super().update_blocks(*allocations)
        for request in allocations[0]:
            super().draft_len(request.req_id)

    def draft_len(self, req_id: str) -> int:
        return self._requests[req_id].draft_len


class LetsTwoWriteOneBlock(DraftCursor):
    def waits_for_another(self, req_ids: Sequence[str], feeds: Any) -> np.ndarray:
        return np.zeros(len(req_ids), dtype=bool)


class WaitsForTheIdle(DraftCursor):
    """Also for requests that will not feed the block."""

    def waits_for_another(self, req_ids: Sequence[str], feeds: Any) -> np.ndarray:
        return super().waits_for_another(req_ids, np.ones_like(feeds))


class CallsStartedBlocksWhole(DraftCursor):
    def advance(self, req_id: str, draft_len: int) -> None:
        super().advance(req_id, draft_len)
        block_ids = self._requests[req_id].block_ids
        self._block_is_valid[block_ids[: -(-draft_len // self._block_size)]] = True


class KeepsOldDraftsPending(DraftCursor):
    """What was fed for earlier drafts counts for later, shorter ones."""

    def record_fed_drafts(self, req_id: str, num_fed_drafts: int) -> None:
        state = self._requests[req_id]
        self._most = max(getattr(self, "_most", 0), num_fed_drafts)
        state.num_fed_drafts = self._most


@pytest.mark.parametrize(
    "broken_cursor",
    [
        CountsUnfedDrafts,
        ForgetsAcceptedDrafts,
        KeepsReallocatedBlocksValid,
        TrustsEveryHit,
        TrustsNoHit,
        LooksUpBeforeAllAreCleared,
        LooksUpAtAdmissionOnly,
        LetsTwoWriteOneBlock,
        WaitsForTheIdle,
        CallsStartedBlocksWhole,
        KeepsOldDraftsPending,
    ],
)
def test_simulation_catches_planted_error(broken_cursor: type[DraftCursor]) -> None:
    with pytest.raises(AssertionError):
        run_all_seeds(broken_cursor)


class MovesBeforeFeeding(DraftModelProposer):
    """Right, until a forward fails."""

    def _draft(self, batch: DraftBatch, rows: Any, draft_lens: np.ndarray) -> Any:
        for i, end in zip(rows.req_indices, rows.seq_lens, strict=True):
            self._cursor.advance(batch.req_ids[i], int(end))
        return super()._draft(batch, rows, draft_lens)


def test_simulation_catches_a_cursor_that_moves_too_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulated_worker, "DraftModelProposer", MovesBeforeFeeding)
    run_all_seeds(DraftCursor)
    with pytest.raises(AssertionError):
        run_all_seeds(DraftCursor, failure_chance=0.1)


class Misheard:
    """What a broken proposer makes of the policy; the checks know the true one."""

    def __init__(self, policy: RandomLengths) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


class FeedsEveryPrompt(Misheard):
    feeds_prompts = True


class FeedsNoPrompt(Misheard):
    feeds_prompts = False


class NeverStops(Misheard):
    def continue_drafting(self, req_indices: np.ndarray, *args: Any) -> np.ndarray:
        self._policy.continue_drafting(req_indices, *args)
        return np.ones(len(req_indices), dtype=bool)


class StopsTheWrongRequests(Misheard):
    def continue_drafting(self, *args: Any) -> np.ndarray:
        return self._policy.continue_drafting(*args)[::-1]


class MixesUpConfidence(Misheard):
    def continue_drafting(
        self, req_indices: np.ndarray, confidence: np.ndarray, position: int
    ) -> np.ndarray:
        return self._policy.continue_drafting(req_indices, confidence[::-1], position)


class NeverTrims(Misheard):
    def trim(self, draft_lens: np.ndarray) -> np.ndarray:
        self._policy.trim(draft_lens)
        return draft_lens


class ForgetsToObserve(Misheard):
    def observe(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize(
    "misheard",
    [
        FeedsEveryPrompt,
        FeedsNoPrompt,
        NeverStops,
        StopsTheWrongRequests,
        MixesUpConfidence,
        NeverTrims,
        ForgetsToObserve,
    ],
)
def test_simulation_catches_a_misheard_policy(misheard: type[Misheard]) -> None:
    with pytest.raises(AssertionError):
        run_all_seeds(DraftCursor, misheard)


def run_all_seeds(
    make_cursor: type[DraftCursor],
    seen_by_proposer: Callable[[RandomLengths], DraftLengthPolicy] = lambda p: p,
    failure_chance: float = 0.0,
) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        setup = Setup(seed, failure_chance=failure_chance)
        seen += Engine(setup, make_cursor, seen_by_proposer).run()
    return seen


class UnusableDrafter:
    max_num_rows = max_model_len = 8

    def forward(self, *args: object) -> None:
        raise AssertionError("a forward without drafts to make")


@pytest.mark.parametrize("num_reqs", [0, 1, 3])
def test_no_draft_wanted_costs_no_forward(num_reqs: int) -> None:
    """Length 0 for all must cost what a step without speculation costs."""
    cursor = DraftCursor(num_blocks=8, block_size=4)
    cursor.update_blocks([AdmittedRequest(f"r{i}", [i], 0) for i in range(3)], [])
    counters = Counters()
    proposer = DraftModelProposer(
        UnusableDrafter(), cursor, DraftLengthPolicy(), counters
    )
    batch = batch_of({f"r{i}": [0] * 3 for i in range(num_reqs)}, [0] * num_reqs)
    assert proposer.propose(batch) == [[] for _ in range(num_reqs)]
    assert counters == Counters()


class RecordingDrafter:
    """Records the rows of each forward."""

    max_num_rows = max_model_len = 64

    def __init__(self) -> None:
        self.fed: list[list[tuple[int, int]]] = []  # request, position

    def forward(
        self, rows: RaggedRows, token_ids: Any, sampled_rows: np.ndarray, _: int
    ) -> tuple[torch.Tensor, None]:
        positions = rows.positions.tolist()
        requests = rows.row_req_indices.tolist()
        self.fed.append(list(zip(requests, positions, strict=True)))
        return torch.zeros(len(sampled_rows), dtype=torch.int64), None


@pytest.mark.parametrize("policy", [DraftLengthPolicy(), FixedDraftLength(0)])
def test_every_prompt_is_fed_where_others_take_its_kv(
    policy: DraftLengthPolicy,
) -> None:
    """Of requests that want no drafts, in chunks, and nothing but the prompt."""
    cursor = DraftCursor(num_blocks=8, block_size=4, trust_cached_blocks=False)
    cursor.update_blocks(
        [AdmittedRequest(r, [2 * i, 2 * i + 1], 0) for i, r in enumerate("abc")], []
    )
    drafter = RecordingDrafter()
    proposer = DraftModelProposer(
        drafter, cursor, policy, Counters(), feeds_every_prompt=True
    )
    assert not proposer.skips_step(3)
    # a: all of its prompt of 3 and one token sampled; b: 2 tokens of its prompt of 5;
    # c: decodes behind a prompt of 2.
    batch = batch_of(
        {"a": [0] * 4, "b": [0] * 5, "c": [0] * 4},
        [0, 0, 0],
        [True, False, True],
        num_prompt_tokens=[3, 5, 2],
        num_scheduled_tokens=[3, 2, 1],
        num_prefilled_tokens=[3, 2, 3],
    )
    assert proposer.propose(batch) == [[], [], []]
    assert drafter.fed == [[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]]
    assert [cursor.draft_len(r) for r in "abc"] == [3, 2, 0]
