"""A cursor that learns acceptance late: no row is missed, and in the end all is as if
it had known in time."""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.async_draft_cursor import AsyncDraftCursor, UnverifiedStep
from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor

BLOCK_SIZE = 4
NUM_BLOCKS = 64
K = 4
PROMPT = 5
SLOT = np.array([0])


class Pair:
    """One request decoded twice: by a late cursor, which learns `num_late` steps later
    what was accepted, and by one that is told in time."""

    def __init__(self, num_late: int = 0) -> None:
        self.late = AsyncDraftCursor(1, NUM_BLOCKS, BLOCK_SIZE, NUM_BLOCKS)
        self.in_time = DraftCursor(NUM_BLOCKS, BLOCK_SIZE)
        admitted = AdmittedRequest("a", range(NUM_BLOCKS), 0)
        self.late.update_blocks([(0, PROMPT, admitted)], [])
        self.in_time.update_blocks([admitted], [])
        self.num_late = num_late
        self.num_tokens = PROMPT  # known
        self.num_drafts = 0  # being verified
        self.num_copied = 0  # of them, by another proposer
        # Each step and how many drafts it accepted, oldest first.
        self.pending: list[tuple[UnverifiedStep, int]] = []
        self.copies_pending: list[int] = []  # verified in these steps
        self.max_behind = 0  # where it was fed from before the text on
        self.seen: Counter[str] = Counter()

    def step(
        self, num_accepted: int, num_next: int | None, budget: int, num_copied: int = 0
    ) -> None:
        """The target accepts; the drafter is fed, unless `num_next` is None, up to
        `budget` rows of what it lacks but for the last two tokens, and with these makes
        `num_next` drafts. Where it makes none, another proposer makes some."""
        had_drafted = self.num_drafts > self.num_copied
        self.copies_pending.append(self.num_copied)
        not_known = sum(self.copies_pending)
        unverified = self.late.begin(
            SLOT, np.array([True]), np.array([self.num_drafts])
        )
        self.num_tokens += 1 + num_accepted
        self.in_time.record_verified("a", num_accepted)
        valid = self.in_time.draft_len("a")
        lacking = int(self.late.num_uncached_tokens(SLOT)[0])
        start = self.num_tokens - lacking
        assert start <= valid, "skips a token"
        max_in_vain = 1 + not_known + self.max_behind
        assert valid <= start + max_in_vain, "feeds a token in vain"
        if had_drafted and not not_known:
            assert lacking <= 2
        self.max_behind = max(self.max_behind, -start)
        start = max(start, 0)
        drafts = num_next or 0
        if num_next is not None:
            wanted = max(lacking - 2, 0)
            granted = min(wanted, budget)
            self.late.feed(SLOT, np.array([granted]))
            # Where it began before the text, what follows the text is fed in vain.
            fed = min(max(start + granted, valid), self.num_tokens)
            self.in_time.advance("a", fed)
            drafts = drafts if granted == wanted else 0
            self.seen["fed again"] += start < valid
            self.seen["chunked"] += granted < wanted
        if drafts:
            self.late.draft(SLOT, np.array([drafts - 1]))
            self.in_time.advance("a", self.num_tokens)
            self.in_time.record_fed_drafts("a", drafts - 1)
        self.late.end(unverified)
        self.pending.append((unverified, num_accepted))
        self.hear(self.num_late)
        self.num_copied = 0 if drafts else num_copied
        self.num_drafts = drafts or num_copied

    def hear(self, num_late: int, is_running: bool = True) -> None:
        """All acceptance but the last `num_late`."""
        while len(self.pending) > num_late:
            unverified, num_accepted = self.pending.pop(0)
            self.copies_pending.pop(0)
            self.late.record_acceptance(
                unverified, np.array([num_accepted]), np.array([is_running])
            )

    def draft_len(self) -> int:
        return int(self.late._draft_len[0])

    def check(self) -> None:
        self.seen["known late"] += len(self.pending)
        behind = self.in_time.draft_len("a") - self.draft_len()
        cursors = self.late, self.in_time
        valid, all_valid = (cursor._block_is_valid for cursor in cursors)
        assert not (valid & ~all_valid).any(), "vouches for what it did not feed"
        assert behind >= 0
        if not self.pending:
            assert behind <= self.max_behind
        if not self.pending and not behind:
            assert valid.tolist() == all_valid.tolist()


def run(seed: int) -> Counter[str]:
    rng = random.Random(seed)
    pair = Pair(rng.choice([0, 1, 2]))
    for _ in range(25):
        made = pair.num_drafts
        if rng.random() < 0.2:  # a grammar cuts drafts that were fed
            pair.num_drafts = rng.randint(0, made)
            pair.num_copied = min(pair.num_copied, pair.num_drafts)
            pair.seen["cut"] += pair.num_drafts < made
        pair.seen["copied"] += pair.num_copied > 0
        accepted = rng.randint(0, pair.num_drafts)
        pair.seen["all accepted"] += accepted == K
        pair.seen["none accepted"] += pair.num_drafts > 0 == accepted
        num_next = rng.choice([None, 0, 1, K, K, K])
        num_copied = rng.choice([0, 0, 2, 2 * K])
        pair.step(accepted, num_next, rng.choice([1, 3, 100, 100]), num_copied)
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
        "copied",
        "cut",
        "fed again",
        "known late",
        "none accepted",
    }
    assert min(seen.values()) >= 10


@pytest.mark.parametrize("num_late", [0, 1, 2])
def test_two_rows_after_drafting_whatever_was_accepted(num_late: int) -> None:
    for num_accepted in range(K + 1):
        pair = Pair(num_late)
        pair.step(0, K, 100)
        for _ in range(4):
            late = copy.deepcopy(pair.late)
            late.begin(SLOT, np.array([True]), np.array([K]))
            assert late.num_uncached_tokens(SLOT).tolist() == [2]
            pair.step(num_accepted, K, 100)
            pair.check()
        assert pair.seen["chunked"] == 0


def test_what_is_certain_is_recorded_at_once() -> None:
    """Others that share a block need not feed it again."""
    pair = Pair(num_late=2)
    pair.step(0, K, 100)
    assert pair.draft_len() == pair.num_tokens


def test_a_request_that_left_meanwhile_is_not_recorded() -> None:
    """Its blocks are another's by the time its acceptance is known."""
    pair = Pair(num_late=2)
    for num_accepted in (0, K, K):
        pair.step(num_accepted, K, 100)
    assert pair.pending
    again = AdmittedRequest("a", range(NUM_BLOCKS), 0)
    pair.late.update_blocks([(0, PROMPT, again)], [])
    pair.hear(0, is_running=False)
    assert pair.draft_len() == 0
    assert not pair.late._block_is_valid.any()


@pytest.mark.parametrize("more", [-1, 1])
def test_a_wrong_bound_is_noticed(monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    """The property fails for a bound that is too low, or that costs a row too many."""
    right = AsyncDraftCursor.begin

    def begin(self: AsyncDraftCursor, *args: np.ndarray) -> UnverifiedStep:
        unverified = right(self, *args)
        self._num_uncached_tokens[unverified.slots] += more * (args[2] > 0)
        return unverified

    monkeypatch.setattr(AsyncDraftCursor, "begin", begin)
    with pytest.raises((AssertionError, ValueError)):
        run_seeds()


def many(num_hits: int = 0, trust: bool = True) -> AsyncDraftCursor:
    """Two requests with the same first two blocks, `num_hits` tokens of them cached."""
    cursor = AsyncDraftCursor(4, NUM_BLOCKS, BLOCK_SIZE, NUM_BLOCKS, trust)
    blocks = [[1, 2, 3], [1, 2, 4]]
    for slot in (0, 1):
        hits = num_hits * slot
        request = AdmittedRequest(str(slot), blocks[slot], hits)
        cursor.update_blocks([(slot, 3 * BLOCK_SIZE, request)], [])
    return cursor


def prefill(cursor: AsyncDraftCursor, slot: int, num_rows: int) -> None:
    slots = np.array([slot])
    unverified = cursor.begin(slots, np.array([False]), np.array([0]))
    cursor.feed(slots, np.array([num_rows]))
    cursor.end(unverified)


@pytest.mark.parametrize("trust", [False, True])
def test_blocks_that_another_filled_count_where_they_are_trusted(trust: bool) -> None:
    cursor = many(2 * BLOCK_SIZE, trust)
    both = np.array([0, 1])
    assert cursor.num_uncached_tokens(both).tolist() == [12, 12]
    prefill(cursor, 0, BLOCK_SIZE + 1)
    assert cursor.num_uncached_tokens(both).tolist() == [7, 8 if trust else 12]
    prefill(cursor, 0, 3)
    assert cursor.num_uncached_tokens(both).tolist() == [4, 4 if trust else 12]
    cursor.update_blocks([], [(2, [2])])  # its content is another's now
    assert not cursor._block_is_valid[2]


def test_blocks_that_two_fed_count_once() -> None:
    """One of them while its acceptance is not known."""
    cursor, slots = many(2 * BLOCK_SIZE), np.array([1])
    unverified = cursor.begin(slots, np.array([True]), np.array([K]))
    cursor.feed(slots, np.array([BLOCK_SIZE]))
    cursor.end(unverified)
    prefill(cursor, 0, 2 * BLOCK_SIZE)
    known = 3 * BLOCK_SIZE + 1 + K
    assert cursor.num_uncached_tokens(slots)[0] >= known - 2 * BLOCK_SIZE
    cursor.record_acceptance(unverified, np.array([K]), np.array([True]))
    assert cursor.num_uncached_tokens(slots).tolist() == [known - 2 * BLOCK_SIZE]


def test_a_look_for_shared_blocks_takes_as_many_operations_for_any_number() -> None:
    """Of requests that have a gap."""
    num_calls = []
    for num_reqs in (2, 32):
        cursor, slots = AsyncDraftCursor(32, 33, BLOCK_SIZE, 4), np.arange(num_reqs)
        for slot in range(num_reqs):
            request = AdmittedRequest(str(slot), [0, 1 + slot], BLOCK_SIZE)
            cursor.update_blocks([(slot, 6, request)], [])
        cursor._block_is_valid[0] = True
        calls: list[str] = []
        sys.setprofile(lambda frame, event, arg, to=calls: to.append(event))
        lacking = cursor.num_uncached_tokens(slots)
        sys.setprofile(None)
        assert lacking.tolist() == [2] * num_reqs
        num_calls.append(len(calls))
    assert num_calls[0] == num_calls[1]


def test_of_those_that_begin_in_a_block_one_writes_it() -> None:
    cursor = many()
    both, feed = np.array([1, 0]), np.ones(2, dtype=bool)
    assert cursor.waits_for_another(both, feed).tolist() == [False, True]
    one_feeds = np.array([False, True])
    assert cursor.waits_for_another(both, one_feeds).tolist() == [False, False]
    prefill(cursor, 0, 2 * BLOCK_SIZE)
    prefill(cursor, 1, 2 * BLOCK_SIZE)
    assert cursor.waits_for_another(both, feed).tolist() == [False, False]


def test_requests_with_no_block_yet_do_not_wait_for_each_other() -> None:
    cursor = AsyncDraftCursor(2, NUM_BLOCKS, BLOCK_SIZE, NUM_BLOCKS)
    feed = np.ones(2, dtype=bool)
    assert not cursor.waits_for_another(np.array([0, 1]), feed).any()
