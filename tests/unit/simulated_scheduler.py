"""A scheduler over paged, prefix-cached blocks, and the target's acceptance: no models.

It does at random all that vLLM's may do to a drafter: admit, hit cached blocks, cut
prefill into chunks, leave requests out, trim drafts, preempt, resume, abort, and
reuse blocks and request ids.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from tests.oracle import VOCAB_SIZE


@dataclass(frozen=True)
class Setup:
    """One simulated deployment and the seed of its traffic."""

    seed: int
    num_steps: int = 40
    max_num_reqs: int = 4
    num_spec_tokens: int = 4
    block_size: int = 4
    num_spare_blocks: int = 8  # beyond what the longest request needs
    max_model_len: int = 32
    drafter_max_model_len: int = 32
    token_budget: int = 24  # the target's rows a step
    max_num_rows: int = 24  # the drafter's rows a forward
    trust_cached_blocks: bool = True
    drafts_always: bool = False  # the policy never asks for fewer than the most
    tells_confidence: bool = True  # the drafter, of each draft
    failure_chance: float = 0.0  # of each draft forward, and of each verification

    @property
    def max_blocks_per_req(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @property
    def num_blocks(self) -> int:
        return self.max_blocks_per_req + self.num_spare_blocks


@dataclass(eq=False)
class Request:
    req_id: str
    tokens: list[int]  # known
    num_prompt_tokens: int
    admission: int = -1  # differs each time it is admitted
    block_ids: list[int] = field(default_factory=list)
    num_hit_tokens: int = 0  # of this admission
    num_computed_tokens: int = 0
    drafts: list[int] = field(default_factory=list)  # pending
    has_drafted: bool = False  # in its last step since admission


@dataclass
class Schedule:
    """What the worker is told of one step."""

    finished: list[str]
    num_scheduled: dict[Request, int] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)
    extended: list[tuple[Request, list[int]]] = field(default_factory=list)
    fresh_block_ids: list[int] = field(default_factory=list)


class BlockPool:
    """Physical blocks, and which text the full ones hold."""

    def __init__(self, num_blocks: int, rng: random.Random) -> None:
        self._rng = rng
        self.free = set(range(num_blocks))
        self._num_users = [0] * num_blocks
        self._text_of: dict[int, tuple[int, ...]] = {}
        self._block_of: dict[tuple[int, ...], int] = {}

    def take_cached(self, tokens: list[int], block_size: int) -> list[int]:
        """Blocks that hold leading tokens; one token at least stays to compute."""
        hit = []
        for end in range(block_size, len(tokens), block_size):
            block_id = self._block_of.get(tuple(tokens[:end]))
            if block_id is None:
                break
            hit.append(block_id)
        for block_id in hit:
            self.free.discard(block_id)
            self._num_users[block_id] += 1
        return hit

    def take_fresh(self, num_blocks: int) -> list[int]:
        chosen = self._rng.sample(sorted(self.free), num_blocks)
        for block_id in chosen:
            self.free.discard(block_id)
            self._num_users[block_id] = 1
            self._block_of.pop(self._text_of.pop(block_id, ()), None)
        return chosen

    def give_back(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._num_users[block_id] -= 1
            if self._num_users[block_id] == 0:
                self.free.add(block_id)

    def remember(self, block_id: int, text: tuple[int, ...]) -> None:
        if block_id not in self._text_of and text not in self._block_of:
            self._text_of[block_id], self._block_of[text] = text, block_id


class Scheduler:
    """`schedule`, then `verify` for each request that sampled, then `finish`."""

    def __init__(self, setup: Setup, rng: random.Random) -> None:
        self._setup, self._rng = setup, rng
        self._pool = BlockPool(setup.num_blocks, rng)
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._finished: list[str] = []  # since the worker was last told
        self._texts = [self._random_tokens(setup.max_model_len) for _ in range(2)]
        self._num_req_ids = self._num_admissions = 0
        self._old_req_ids: list[str] = []
        self.seen: Counter[str] = Counter()  # what this run exercised

    def schedule(self) -> Schedule:
        for request in [*self._running, *self._waiting]:
            if self._chance(0.03):
                self.seen["aborted"] += 1
                self._end(request)
        self._schedule = Schedule(self._finished)
        self._finished = []
        self._budget = self._setup.token_budget
        self._preempted: list[Request] = []
        if self._running and self._chance(0.05):
            self._preempt(self._rng.choice(self._running))
        for request in self._shuffled(self._running):
            if request in self._running:  # not preempted meanwhile
                self._schedule_running(request)
        while len(self._running) + len(self._waiting) < self._setup.max_num_reqs:
            self._waiting.append(self._new_request())
        for request in self._shuffled(self._waiting):
            if request not in self._preempted and self._chance(0.7):
                self._admit(request)
        return self._schedule

    def verify(self, request: Request) -> int:
        """The target accepts some drafts and adds a token. Returns how many."""
        drafts = request.drafts
        num_accepted = len(drafts)
        if self._chance(0.5):
            num_accepted = self._rng.randint(0, len(drafts))
        bonus = self._rng.randrange(VOCAB_SIZE)
        if num_accepted < len(drafts) and bonus == drafts[num_accepted]:
            bonus = (bonus + 1) % VOCAB_SIZE  # rejected is rejected
        request.num_computed_tokens = len(request.tokens) + num_accepted
        request.tokens = [*request.tokens, *drafts[:num_accepted], bonus]
        request.drafts = []
        return num_accepted

    def abort_any(self) -> None:
        self.seen["aborted"] += 1
        self._end(self._rng.choice([*self._running, *self._waiting]))

    def preempt_any(self) -> None:
        """As if its blocks were wanted; it may resume in the very next step."""
        self._preempted = []
        self._preempt(self._rng.choice(self._running))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_requests(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def known_req_ids(self) -> set[str]:
        """Requests that the worker may keep state of: all but the finished ones that it
        was told of."""
        requests = [*self._running, *self._waiting]
        return {r.req_id for r in requests} | set(self._finished)

    def finish(self) -> None:
        for request in list(self._schedule.num_scheduled):
            is_full = len(request.tokens) >= self._setup.max_model_len
            if is_full or self._chance(0.04):
                self.seen["reached max_model_len"] += is_full
                self._end(request)

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _shuffled(self, requests: list[Request]) -> list[Request]:
        return self._rng.sample(requests, len(requests))

    def _random_tokens(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]

    def _new_request(self) -> Request:
        """Its prompt often begins as another text did, which may be an answer."""
        text, longest = self._rng.choice(self._texts), self._setup.max_model_len - 2
        shared = text[: self._rng.randint(0, longest - 1)]
        own = self._random_tokens(self._rng.randint(0 if shared else 1, 3))
        prompt = [*shared, *own][:longest]
        if self._old_req_ids and self._chance(0.1):
            return Request(self._old_req_ids.pop(), prompt, len(prompt))
        self._num_req_ids += 1
        return Request(f"r{self._num_req_ids}", prompt, len(prompt))

    def _schedule_running(self, request: Request) -> None:
        if self._chance(0.15):
            self.seen["left out with drafts pending"] += bool(request.drafts)
            return
        num_drafts = len(request.drafts)
        if self._chance(0.25):
            num_drafts = self._rng.randint(0, num_drafts)
        missing = len(request.tokens) - request.num_computed_tokens
        num_scheduled = min(missing + num_drafts, self._budget)
        if num_scheduled > 1 and missing > 1 and self._chance(0.5):
            num_scheduled = self._rng.randint(1, num_scheduled - 1)
        if num_scheduled < 1 or not self._make_room(request, num_scheduled):
            return
        num_fresh = self._num_blocks_missing(request, num_scheduled)
        if num_fresh:
            fresh = self._give_fresh(request, num_fresh)
            self._schedule.extended.append((request, fresh))
        self._take_tokens(request, num_scheduled)

    def _make_room(self, request: Request, num_scheduled: int) -> bool:
        """Preempt others, in the end the request itself, until its blocks are free."""
        num_fresh = self._num_blocks_missing(request, num_scheduled)
        while num_fresh > len(self._pool.free):
            scheduled = self._schedule.num_scheduled
            victims = [r for r in self._running if r not in scheduled]
            self._preempt(self._rng.choice(victims))
            if request not in self._running:
                return False
        return True

    def _admit(self, request: Request) -> None:
        hit = self._pool.take_cached(request.tokens, self._setup.block_size)
        request.block_ids = list(hit)
        request.num_hit_tokens = len(hit) * self._setup.block_size
        request.num_computed_tokens = request.num_hit_tokens
        missing = len(request.tokens) - request.num_computed_tokens
        num_scheduled = min(missing, self._budget)
        if num_scheduled > 1 and self._chance(0.4):
            num_scheduled = self._rng.randint(1, num_scheduled - 1)
        num_fresh = self._num_blocks_missing(request, num_scheduled)
        if num_scheduled < 1 or num_fresh > len(self._pool.free):
            self._reset(request)
            return
        self.seen["resumed"] += request.admission >= 0
        request.admission = self._num_admissions
        self._num_admissions += 1
        self._give_fresh(request, num_fresh)
        self._waiting.remove(request)
        self._running.append(request)
        self._schedule.admitted.append(request)
        self._take_tokens(request, num_scheduled)

    def _num_blocks_missing(self, request: Request, num_scheduled: int) -> int:
        """With room for the step's drafts, as vLLM's num_lookahead_tokens."""
        end = request.num_computed_tokens + num_scheduled + self._setup.num_spec_tokens
        end = min(end, self._setup.max_model_len)
        return max(0, -(-end // self._setup.block_size) - len(request.block_ids))

    def _give_fresh(self, request: Request, num_blocks: int) -> list[int]:
        fresh = self._pool.take_fresh(num_blocks)
        self._schedule.fresh_block_ids.extend(fresh)
        request.block_ids.extend(fresh)
        return fresh

    def _take_tokens(self, request: Request, num_scheduled: int) -> None:
        """As vLLM does, name the known blocks before they are computed: others may
        hit them in this very step."""
        self._schedule.num_scheduled[request] = num_scheduled
        self._budget -= num_scheduled
        end = request.num_computed_tokens + num_scheduled
        num_drafts = max(0, end - len(request.tokens))
        self.seen["drafts trimmed"] += num_drafts < len(request.drafts)
        self.seen["prefill chunked"] += end < len(request.tokens)
        request.drafts = request.drafts[:num_drafts]
        size = self._setup.block_size
        for i in range(min(end, len(request.tokens)) // size):
            text = tuple(request.tokens[: (i + 1) * size])
            self._pool.remember(request.block_ids[i], text)

    def _preempt(self, request: Request) -> None:
        self.seen["preempted"] += 1
        self._running.remove(request)
        self._waiting.append(request)
        self._preempted.append(request)
        self._reset(request)

    def _reset(self, request: Request) -> None:
        self._pool.give_back(request.block_ids)
        request.block_ids, request.drafts = [], []
        request.num_computed_tokens = 0
        request.has_drafted = False

    def _end(self, request: Request) -> None:
        queue = self._running if request in self._running else self._waiting
        queue.remove(request)
        self._reset(request)
        if request.admission >= 0:
            self._finished.append(request.req_id)
            self._old_req_ids.append(request.req_id)
            self._texts.append(request.tokens)
