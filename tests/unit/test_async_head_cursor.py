"""What the head is fed, late or from another's hidden states, is what it lacks; and no
request waits for ever for states that are lost."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.async_draft_cursor import UnverifiedStep
from vllm_emssd.async_head_cursor import AsyncHeadCursor
from vllm_emssd.draft_cursor import AdmittedRequest

BLOCK_SIZE, MAX_BLOCKS, NUM_BLOCKS, NUM_SLOTS = 8, 10, 36, 3
MAX_ROWS = 16  # of a step
NUM_KEPT = 4 * MAX_ROWS
K = 3
State = tuple[int, ...]  # the text up to its token


@dataclass
class Request:
    slot: int
    text: list[int]
    blocks: list[int]
    num_hits: int
    num_computed: int
    start: int = 0  # of the step's rows
    prompt_len: int = 0
    num_drafts: int = 0  # to be verified
    pending: list[int] = field(default_factory=list)  # rejected, not settled
    num_waits: int = 0  # steps in which it was not fed though it was to draft

    def __post_init__(self) -> None:
        self.prompt_len = len(self.text)

    def state(self, position: int) -> State:
        return tuple(self.text[: position + 1])

    def place(self, position: int) -> tuple[int, int]:
        index, offset = divmod(position, BLOCK_SIZE)
        return self.blocks[index], offset


class World:
    """A target, a prefix cache and a head, whose K/V is the states it was fed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.cursor = AsyncHeadCursor(
            NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_BLOCKS, num_rows=NUM_KEPT
        )
        self.num_late = self.rng.choice([0, 1, 2])
        self.requests: list[Request] = []
        self.texts = [[0] * 10]  # which others go on from
        self.free = list(range(NUM_BLOCKS))
        self.users: Counter[int] = Counter()
        self.cached: OrderedDict[State, int] = OrderedDict()
        self.ring: list[State | None] = [None] * NUM_KEPT
        self.row_of: dict[tuple[int, int], int] = {}
        self.head: dict[tuple[int, int], State] = {}
        self.unverified: list[tuple[UnverifiedStep, list[Request], np.ndarray]] = []
        self.seen: Counter[str] = Counter()

    def block(self) -> int:
        if not self.free:
            unused = (text for text, b in self.cached.items() if not self.users[b])
            self.free.append(self.cached.pop(next(unused)))
        block = self.free.pop(0)
        self.users[block] += 1
        return block

    def admit(self) -> None:
        slots = set(range(NUM_SLOTS)) - {request.slot for request in self.requests}
        text = self.rng.choice(self.texts)[: self.rng.randint(3, 40)]
        text = text + [self.rng.randrange(1000)] * self.rng.randint(1, 3)
        hits = []
        for end in range(BLOCK_SIZE, len(text), BLOCK_SIZE):
            if tuple(text[:end]) not in self.cached:
                break
            hits.append(self.cached[tuple(text[:end])])
        self.users.update(hits)
        num_hits = len(hits) * BLOCK_SIZE
        request = Request(min(slots), text, hits, num_hits, num_hits)
        while len(request.blocks) * BLOCK_SIZE < len(text):
            request.blocks.append(self.block())
        admitted = AdmittedRequest("", request.blocks, num_hits)
        self.cursor.update_blocks([(request.slot, len(text), admitted)], [])
        self.requests.append(request)

    def finish(self, request: Request) -> None:
        self.requests.remove(request)
        self.texts = [*self.texts[-2:], request.text]
        self.cursor.vacate(request.slot)
        self.users.subtract(request.blocks)
        cached = set(self.cached.values())
        self.free += [b for b in request.blocks[::-1] if b not in cached]

    def step(self, drafts: bool, budget: int = 100) -> None:
        if len(self.requests) < NUM_SLOTS and self.rng.random() < 0.4:
            self.admit()
        for request in self.requests[:]:
            is_long = len(request.text) > (MAX_BLOCKS - 3) * BLOCK_SIZE
            if is_long or self.rng.random() < 0.03:
                self.finish(request)
        if not self.requests:
            return
        lens, starts, samples, accepted = [], [], [], []
        for request in self.requests:
            left = request.prompt_len - request.num_computed
            length = min(left, MAX_ROWS // NUM_SLOTS) if left > 0 else 1
            length += request.num_drafts
            lens.append(length)
            starts.append(request.num_computed + sum(request.pending))
            samples.append(left <= length)
            accepted.append(self.rng.randint(0, request.num_drafts))
            ids = []
            while len(request.blocks) * BLOCK_SIZE < starts[-1] + length + K:
                ids.append(self.block())
                request.blocks.append(ids[-1])
            self.cursor.update_blocks([], [(request.slot, ids)])
        slots = np.array([request.slot for request in self.requests])
        num_drafts = np.array([request.num_drafts for request in self.requests])
        is_sampling, own = np.array(samples), np.array(lens)
        unverified = self.cursor.begin(slots, is_sampling, num_drafts)
        self.unverified.append((unverified, self.requests[:], np.array(accepted)))
        self.compute(lens, samples, accepted)
        later = np.array(
            [
                1 if samples[i] else r.prompt_len - r.num_computed
                for i, r in enumerate(self.requests)
            ]
        )
        self.speculate(unverified, slots, own, later, drafts, budget)
        self.cursor.end(unverified)
        lacks = self.cursor.num_uncached_tokens(slots) > later
        self.cursor.keep_nothing(slots[~lacks])
        if lacks.any():
            number = self.cursor.take_rows(len(self.states))
            for i, (place, state) in enumerate(self.states):
                self.ring[(number + i) % NUM_KEPT] = state
                self.row_of[place] = (number + i) % NUM_KEPT
            positions = np.array(starts)[lacks]
            self.cursor.keep(slots[lacks], number, positions, own[lacks])
        self.settle(self.num_late)

    def compute(
        self, lens: list[int], samples: list[bool], accepted: list[int]
    ) -> None:
        """Each request's rows by the target, with their places and states."""
        self.states: list[tuple[tuple[int, int], State]] = []
        for request, length, is_sampling, num_accepted in zip(
            self.requests, lens, samples, accepted, strict=True
        ):
            start = request.start = request.num_computed
            request.num_computed += length
            if is_sampling:
                new = 1 + num_accepted
                request.text += [self.rng.randrange(1000) for _ in range(new)]
                request.num_computed = len(request.text) - 1
            request.pending.append(start + length - request.num_computed)
            for position in range(start, start + length):
                is_right = position < request.num_computed
                state = request.state(position) if is_right else (-1,)
                self.states.append((request.place(position), state))
            for end in range(BLOCK_SIZE, request.num_computed + 1, BLOCK_SIZE):
                block, _ = request.place(end - 1)
                self.cached.setdefault(tuple(request.text[:end]), block)

    def speculate(
        self,
        unverified: UnverifiedStep,
        slots: np.ndarray,
        own: np.ndarray,
        later: np.ndarray,
        drafts: bool,
        budget: int,
    ) -> None:
        """As the speculator does it."""
        cursor = self.cursor

        def missing() -> np.ndarray:
            lacking = cursor.num_uncached_tokens(slots)
            return np.maximum(lacking - later - own, 0)

        is_uncertain, num_missing = cursor.awaits_drafts(unverified), missing()
        if self.rng.random() < 0.3:  # else some are lost
            is_old = cursor.loses_states(slots, 2 * MAX_ROWS)
            is_old &= ~is_uncertain & cursor.has_states(slots)
            self.feed(slots, np.where(is_old, num_missing, 0), num_missing)
            self.seen["fed before they were lost"] += int(is_old.sum())
        for request in self.requests:
            request.num_drafts = 0
        if not drafts:
            return
        num_missing = missing()
        on = (num_missing > 0) & ~is_uncertain
        self.seen["restarted"] += cursor.restart(slots[on], num_missing[on])
        num_missing = missing()
        cannot = (num_missing > 0) & (is_uncertain | ~cursor.has_states(slots))
        wanted = np.where(cannot, 0, num_missing)
        wanted[cursor.waits_for_another(slots, wanted > 0)] = 0
        self.feed(slots, np.minimum(wanted, budget), num_missing)
        num_missing = missing()
        self.head |= dict(self.states)
        fed = num_missing == 0
        cursor.feed(slots[fed], own[fed])
        for i, request in enumerate(self.requests):
            request.num_waits = 0 if fed[i] else request.num_waits + 1
            self.seen["waited"] += request.num_waits > self.num_late
            if fed[i]:
                self.check_head(request)
                is_decoding = request.num_computed >= request.prompt_len
                request.num_drafts = self.rng.randint(0, K) if is_decoding else 0

    def feed(self, slots: np.ndarray, lens: np.ndarray, missing: np.ndarray) -> None:
        fed = np.flatnonzero(lens)
        for i, request in enumerate(self.requests):
            first = request.start - int(missing[i])
            for position in range(first, first + int(lens[i])):
                state = self.ring[self.row_of[request.place(position)]]
                assert state == request.state(position), "another's hidden state"
                self.head[request.place(position)] = state
                self.seen["another's"] += position < request.num_hits
        is_all = lens[fed] == missing[fed]
        self.cursor.feed_kept(slots[fed], lens[fed], is_all)
        self.seen["fed in parts"] += int((~is_all).sum())

    def check_head(self, request: Request) -> None:
        first = int(self.cursor.firsts[request.slot])
        assert first <= request.start, "a row before its text"
        for position in range(first, request.num_computed):
            state = self.head.get(request.place(position))
            assert state == request.state(position), "drafts without some K/V"

    def settle(self, num_late: int) -> None:
        while len(self.unverified) > num_late:
            unverified, requests, accepted = self.unverified.pop(0)
            is_running = [any(r is other for other in self.requests) for r in requests]
            self.cursor.record_acceptance(unverified, accepted, np.array(is_running))
            for request in requests:
                request.pending.pop(0)


def run(seed: int) -> Counter[str]:
    world = World(seed)
    rng = world.rng
    for _ in range(12):
        drafts = rng.random() < 0.5
        for _ in range(rng.choice([1, 4, 30])):
            world.step(drafts, rng.choice([2, 100, 100]))
    for num_idle in (5, 30):
        for _ in range(num_idle):
            world.step(drafts=False)
        for _ in range(BLOCK_SIZE + 2):
            world.step(drafts=True)
            waits = [request.num_waits for request in world.requests]
            assert max(waits, default=0) <= BLOCK_SIZE, "waits for ever"
    return world.seen


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_what_is_fed_late_is_what_was_lacking(seed: int) -> None:
    run(seed)


def run_seeds() -> Counter[str]:
    return sum((run(seed) for seed in range(60)), Counter())


def test_the_runs_visit_what_they_claim() -> None:
    seen = run_seeds()
    assert set(seen) == {
        "another's",
        "fed before they were lost",
        "fed in parts",
        "restarted",
        "waited",
    }
    assert min(seen.values()) >= 10


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("has_states", lambda cursor, slots: np.ones(len(slots), bool)),
        ("_has_gap", lambda cursor, slots: np.zeros(len(slots), bool)),
        ("restart", lambda cursor, slots, num_missing: 0),
    ],
)
def test_a_wrong_cursor_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., Any]
) -> None:
    monkeypatch.setattr(AsyncHeadCursor, name, broken)
    with pytest.raises((AssertionError, KeyError)):
        run_seeds()


def test_a_text_begins_anew_once_it_has_come_to_the_next_block() -> None:
    world = World(0)
    cursor, slots = world.cursor, np.array([0])
    blocks = list(range(MAX_BLOCKS))
    cursor.update_blocks([(0, 5, AdmittedRequest("", blocks, 0))], [])
    restarts = []
    for position in [0, *range(5, 20)]:
        length = 1 if position else 5
        unverified = cursor.begin(slots, np.array([True]), np.array([0]))
        missing = cursor.num_uncached_tokens(slots) - 1 - length
        if position:
            num_restarts = cursor.restart(slots, missing)
            restarts.append((position, num_restarts, int(cursor.firsts[0])))
        number = cursor.take_rows(NUM_KEPT if position == 6 else length)
        cursor.keep(slots, number, np.array([position]), np.array([length]))
        cursor.end(unverified)
    assert restarts[:2] == [(5, 0, 0), (6, 0, 0)]
    # The rows of step 6 push out all before them.
    assert restarts[2] == (7, 0, 0)
    assert [restart for restart in restarts if restart[1]] == [(8, 1, 8)]
    assert cursor.num_uncached_tokens(slots).tolist() == [20 + 1 - 8]
