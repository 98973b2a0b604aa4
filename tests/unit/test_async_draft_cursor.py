"""A cursor that learns acceptance late: no row is missed, and in the end all is as if
it had known in time."""

from __future__ import annotations

import copy
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.async_draft_cursor import AsyncDraftCursor
from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor

BLOCK_SIZE = 4
NUM_BLOCKS = 64
K = 4
PROMPT = 5


class Pair:
    """One request decoded twice: by a late cursor, which learns a acceptance `num_late`
    steps after the next was made, and by one told in time."""

    def __init__(self, num_late: int = 0) -> None:
        self.inner = DraftCursor(NUM_BLOCKS, BLOCK_SIZE)
        self.late = AsyncDraftCursor(self.inner)
        self.in_time = DraftCursor(NUM_BLOCKS, BLOCK_SIZE)
        admitted = AdmittedRequest("a", range(NUM_BLOCKS), 0)
        for cursor in (self.late, self.in_time):
            cursor.update_blocks([admitted], [])
        self.num_late = num_late
        self.num_tokens = PROMPT  # known
        self.num_drafts = 0  # being verified
        self.pending: list[tuple[int, int]] = []  # drafts, accepted; oldest first
        self.seen: Counter[str] = Counter()

    def step(self, num_accepted: int, num_next: int | None, budget: int) -> None:
        """The target accepts; the drafter is fed, unless `num_next` is None, by up to
        `budget` rows and then makes `num_next` drafts."""
        had_drafted = self.num_drafts > 0
        # The host counts drafts as accepted until it learns of them.
        counted = self.num_tokens + sum(n - a for n, a in self.pending)
        assumed = self.late.assume_accepted("a", counted, self.num_drafts)
        assumed_end = counted + 1 + assumed
        self.num_tokens += 1 + num_accepted
        moved_by = self.num_tokens - assumed_end
        self.in_time.record_verified("a", num_accepted)
        missing = self.num_tokens - self.in_time.draft_len("a")
        start = self.late.draft_len("a")
        num_rows = min(assumed_end - start, budget) if num_next is not None else 0
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
        self.late.end_step()
        self.pending.append((self.num_drafts, num_accepted))
        self.hear(self.num_late)
        self.num_drafts = drafts

    def hear(self, num_late: int) -> None:
        """All acceptance but the last `num_late`."""
        while len(self.pending) > num_late:
            _, num_accepted = self.pending.pop(0)
            self.late.record_verified("a", num_accepted)
            self.late.settle()

    def check(self) -> None:
        self.seen["known late"] += len(self.pending)
        mine, others = self.inner, self.in_time
        behind = others.draft_len("a") - mine.draft_len("a")
        valid, all_valid = (cursor._block_is_valid for cursor in (mine, others))
        assert not (valid & ~all_valid).any(), "vouches for what it did not feed"
        if self.pending:
            assert behind >= 0
        else:
            assert behind == 0
            assert valid.tolist() == all_valid.tolist()


def run(seed: int) -> Counter[str]:
    rng = random.Random(seed)
    pair = Pair(rng.choice([0, 1, 2]))
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
    pair.hear(0)
    pair.check()
    return pair.seen


def run_seeds() -> Counter[str]:
    return sum((run(seed) for seed in range(60)), Counter())


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
        "known late",
        "none accepted",
    }
    assert min(seen.values()) >= 10


@pytest.mark.parametrize("num_late", [0, 1, 2])
def test_two_rows_after_drafting_whatever_is_accepted(num_late: int) -> None:
    for num_accepted in range(K + 1):
        pair = Pair(num_late)
        pair.step(0, K, 100)
        for _ in range(4):
            counted = pair.num_tokens + sum(n - a for n, a in pair.pending)
            assumed = copy.deepcopy(pair.late).assume_accepted("a", counted, K)
            assert assumed == 1
            pair.step(num_accepted, K, 100)
            pair.check()
        assert pair.seen["chunked"] == 0


def test_what_is_certain_is_recorded_at_once() -> None:
    """Others that share a block need not feed it again."""
    pair = Pair(num_late=2)
    pair.step(0, K, 100)
    assert pair.inner.draft_len("a") == pair.num_tokens


def test_a_request_released_meanwhile_is_not_recorded() -> None:
    """Its blocks are another's by the time its acceptance is known."""
    pair = Pair(num_late=2)
    for num_accepted in (0, K, K):
        pair.step(num_accepted, K, 100)
    assert pair.pending
    pair.late.release("a")
    again = AdmittedRequest("a", range(NUM_BLOCKS), 0)
    pair.late.update_blocks([again], [])
    pair.hear(0)
    assert pair.inner.draft_len("a") == 0
    assert not pair.inner._block_is_valid.any()


@pytest.mark.parametrize("assumed", [0, 2])
def test_another_assumption_is_noticed(
    monkeypatch: pytest.MonkeyPatch, assumed: int
) -> None:
    """The property fails for a bound that is too low, or that costs a row too many."""
    right = AsyncDraftCursor.assume_accepted

    def assume_accepted(
        self: AsyncDraftCursor, req_id: str, num_tokens: int, num_draft_tokens: int
    ) -> int:
        bound = right(self, req_id, num_tokens, num_draft_tokens)
        if num_draft_tokens == 0:
            return bound
        self._now[req_id].end += assumed - bound
        return assumed

    monkeypatch.setattr(AsyncDraftCursor, "assume_accepted", assume_accepted)
    with pytest.raises((AssertionError, ValueError)):
        run_seeds()
