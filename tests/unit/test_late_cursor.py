"""A cursor that hears verdicts late: no row is missed, and in the end all is as if it
had heard them in time."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor
from vllm_emssd.late_cursor import LateDraftCursor

BLOCK_SIZE = 4
NUM_BLOCKS = 64
K = 4
PROMPT = 5


class Pair:
    """One request decoded twice: by a late cursor, and by one told in time."""

    def __init__(self) -> None:
        self.inner = DraftCursor(NUM_BLOCKS, BLOCK_SIZE)
        self.late = LateDraftCursor(self.inner)
        self.in_time = DraftCursor(NUM_BLOCKS, BLOCK_SIZE)
        admitted = AdmittedRequest("a", range(NUM_BLOCKS), 0)
        for cursor in (self.late, self.in_time):
            cursor.update_blocks([admitted], [])
        self.num_tokens = PROMPT  # known
        self.num_drafts = 0  # being verified
        self.seen: Counter[str] = Counter()

    def step(self, num_accepted: int, num_next: int | None, budget: int) -> None:
        """The target accepts; the drafter is fed, unless `num_next` is None, by up to
        `budget` rows and then makes `num_next` drafts."""
        had_drafted = self.num_drafts > 0
        reckoned = self.late.reckon("a", self.num_drafts)
        reckoned_end = self.num_tokens + 1 + reckoned
        self.num_tokens += 1 + num_accepted
        moved_by = self.num_tokens - reckoned_end
        self.in_time.record_verified("a", num_accepted)
        missing = self.num_tokens - self.in_time.draft_len("a")
        start = self.late.draft_len("a")
        num_rows = min(reckoned_end - start, budget) if num_next is not None else 0
        drafts = num_next or 0
        if num_rows:
            assert num_rows == budget or missing <= num_rows <= missing + 1
            if had_drafted:
                assert num_rows <= 2
            true_start, true_end = (x + moved_by for x in (start, start + num_rows))
            assert 0 <= true_start <= self.in_time.draft_len("a"), "skips a token"
            assert true_end <= self.num_tokens
            drafts = drafts if true_end == self.num_tokens else 0
            self.seen["fed again"] += true_start < self.in_time.draft_len("a")
            self.seen["chunked"] += true_end < self.num_tokens
            self.late.advance("a", start + num_rows)
            self.late.record_fed_drafts("a", max(drafts - 1, 0))
            self.in_time.advance("a", max(true_end, self.in_time.draft_len("a")))
            self.in_time.record_fed_drafts("a", max(drafts - 1, 0))
        self.late.record_verified("a", num_accepted)
        self.late.settle()
        self.num_drafts = drafts

    def check(self) -> None:
        assert self.late.draft_len("a") == self.in_time.draft_len("a")
        assert self.inner.num_fed_drafts("a") == self.in_time.num_fed_drafts("a")
        assert (
            self.inner._block_is_valid.tolist() == self.in_time._block_is_valid.tolist()
        )


def run(seed: int) -> Counter[str]:
    rng, pair = random.Random(seed), Pair()
    for _ in range(25):
        made = pair.num_drafts
        if rng.random() < 0.2:  # a grammar cuts drafts that were fed
            pair.num_drafts = rng.randint(0, made)
            pair.seen["cut"] += pair.num_drafts < made
        accepted = rng.randint(0, pair.num_drafts)
        pair.seen["all accepted"] += accepted == K
        pair.seen["none accepted"] += pair.num_drafts > 0 == accepted
        num_next = rng.choice([None, 0, 1, K, K, K])
        pair.step(accepted, num_next, rng.choice([1, 3, 100, 100]))
        pair.check()
    return pair.seen


def run_seeds() -> Counter[str]:
    return sum((run(seed) for seed in range(30)), Counter())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_late_is_as_in_time(seed: int) -> None:
    run(seed)


def test_the_runs_visit_what_they_claim() -> None:
    seen = run_seeds()
    assert set(seen) == {
        "all accepted",
        "chunked",
        "cut",
        "fed again",
        "none accepted",
    }
    assert min(seen.values()) >= 10


def test_two_rows_after_drafting_whatever_the_verdict() -> None:
    for num_accepted in range(K + 1):
        pair = Pair()
        pair.step(0, K, 100)
        start = pair.late.draft_len("a")
        assert start == pair.num_tokens
        assert pair.num_tokens + 1 + pair.late.reckon("a", K) - start == 2
        pair.step(num_accepted, K, 100)
        pair.check()


@pytest.mark.parametrize("reckons", [0, 2])
def test_another_reckoning_is_noticed(
    monkeypatch: pytest.MonkeyPatch, reckons: int
) -> None:
    """The property fails for a bound that is too low, or that costs a row too many."""
    right = LateDraftCursor.reckon

    def reckon(self: LateDraftCursor, req_id: str, num_draft_tokens: int) -> int:
        bound = right(self, req_id, num_draft_tokens)
        self._reckoned[req_id] = reckons if num_draft_tokens else bound
        return self._reckoned[req_id]

    monkeypatch.setattr(LateDraftCursor, "reckon", reckon)
    with pytest.raises((AssertionError, ValueError)):
        run_seeds()
