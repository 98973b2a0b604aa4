"""A paged, prefix-caching engine without models, to drive the draft-model proposer.

The scheduler does at random all that vLLM's may do: admit, hit cached blocks, cut
prefill into chunks, leave requests out, trim drafts, preempt, resume, abort, reuse
request ids and blocks. The drafter's K/V is a number that depends on the K/V of all
earlier positions, as in a model, so that one wrong slot spoils what follows.
Everything that may not happen is an AssertionError.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from tests import oracle
from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.ragged import RaggedRows


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

    @property
    def max_blocks_per_req(self) -> int:
        return -(-self.max_model_len // self.block_size)


@dataclass
class Request:
    req_id: str
    tokens: list[int]  # known
    num_prompt_tokens: int
    admission: int = -1  # differs each time it is admitted
    block_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    drafts: list[int] = field(default_factory=list)  # pending
    num_trusted: int = 0  # leading tokens whose draft K/V was whole at admission
    has_drafted: bool = False  # in its last step

    @property
    def is_prefill(self) -> bool:
        return self.num_computed_tokens < len(self.tokens) - 1


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


class RandomLengths:
    """A policy that often asks for all, sometimes for nothing, else for anything."""

    def __init__(self, rng: random.Random, always: bool) -> None:
        self._rng, self._always = rng, always
        self.asked: list[int] = []

    def draft_lengths(self, max_draft_tokens: np.ndarray) -> np.ndarray:
        kind = "most" if self._always else self._rng.choice(("most", "none", "any"))
        self.asked = [
            {"most": most, "none": 0, "any": self._rng.randint(0, most)}[kind]
            for most in max_draft_tokens.tolist()
        ]
        return np.array(self.asked, dtype=np.int64)


class CheckingDrafter:
    """The draft model: checks each row it is fed and all that the row attends to."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.max_num_rows = engine.setup.max_num_rows
        self.max_model_len = engine.setup.drafter_max_model_len
        self.start_step([], np.zeros((0, 0), dtype=np.int32))

    def start_step(self, requests: list[Request], block_table: np.ndarray) -> None:
        self._requests, self._block_table = requests, block_table
        self._drafted: list[list[int]] = [[] for _ in requests]
        self.fed: list[list[tuple[int, list[int]]]] = []  # [forward][request]

    def forward(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> torch.Tensor:
        assert draft_position == len(self.fed)
        assert rows.query_start_loc[0] == 0
        assert rows.query_start_loc[-1] == rows.num_rows == len(token_ids)
        assert 1 <= rows.num_rows <= self.max_num_rows
        assert len(set(rows.req_indices.tolist())) == rows.num_reqs
        block_size = self._engine.setup.block_size
        slots = rows.slot_mapping(self._block_table, block_size).tolist()
        bounds, positions = rows.query_start_loc.tolist(), rows.positions.tolist()
        self.fed.append([])
        last_rows = {}
        for i, req_idx in enumerate(rows.req_indices.tolist()):
            span = slice(bounds[i], bounds[i + 1])
            assert positions[span] == sorted(set(positions[span])) != []
            self.fed[-1].append((req_idx, positions[span]))
            for position, slot, token in zip(
                positions[span], slots[span], token_ids[span].tolist(), strict=True
            ):
                self._feed(req_idx, position, slot, token)
            last_rows[bounds[i + 1] - 1] = req_idx
        return self._sample([(last_rows[r], slots[r]) for r in sampled_rows.tolist()])

    def _feed(self, req_idx: int, position: int, slot: int, token: int) -> None:
        engine, request = self._engine, self._requests[req_idx]
        text = request.tokens + self._drafted[req_idx]
        assert position < self.max_model_len
        assert token == text[position]
        assert position // engine.setup.block_size < len(request.block_ids)
        assert slot == engine.slot(request, position), "outside the request's blocks"
        assert position >= request.num_trusted, "its K/V was known to be right"
        assert request.admission not in engine.vouched[slot], "fed twice"
        before = [engine.kv[engine.slot(request, p)] for p in range(position)]
        assert before == oracle.states(text[:position]), "attends to wrong K/V"
        state = oracle.next_state(before[-1] if before else 0, token)
        if engine.kv[slot] != state:
            engine.kv[slot] = state
            engine.vouched[slot].clear()
        engine.vouched[slot].add(request.admission)

    def _sample(self, sampled: list[tuple[int, int]]) -> torch.Tensor:
        tokens = [oracle.draft_after(self._engine.kv[slot]) for _, slot in sampled]
        for (req_idx, _), token in zip(sampled, tokens, strict=True):
            self._drafted[req_idx].append(token)
        return torch.tensor(tokens, dtype=torch.int64)


class Engine:
    """Scheduler, target and worker of one simulated deployment."""

    def __init__(
        self, setup: Setup, make_cursor: Callable[..., DraftCursor] = DraftCursor
    ) -> None:
        self.setup, self.rng = setup, random.Random(setup.seed)
        num_blocks = setup.max_blocks_per_req + setup.num_spare_blocks
        self.pool = BlockPool(num_blocks, self.rng)
        self.kv = [-1] * (num_blocks * setup.block_size)
        # Which admissions know that a slot's draft K/V is that of a known token.
        self.vouched: list[set[int]] = [set() for _ in self.kv]
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.finished: list[str] = []  # since the worker was last told
        self.seen: Counter[str] = Counter()  # what this run exercised
        self._texts = [self._random_tokens(setup.max_model_len) for _ in range(2)]
        self._num_req_ids = self._num_admissions = 0
        self._old_req_ids: list[str] = []

        self.counters = Counters()
        self.cursor = make_cursor(
            num_blocks, setup.block_size, setup.trust_cached_blocks
        )
        self.policy = RandomLengths(self.rng, setup.drafts_always)
        self.drafter = CheckingDrafter(self)
        self.proposer = DraftModelProposer(
            self.drafter, self.cursor, self.policy, self.counters
        )

    def run(self) -> Counter[str]:
        for _ in range(self.setup.num_steps):
            self.step()
        return self.seen

    def step(self) -> None:
        self._abort_some()
        self._schedule()
        self._tell_worker()
        batch = self._verify()
        num_cached = [self._num_cached(request) for request in self.batch]
        counted = self.counters.as_dict()
        drafts = self.proposer.propose(batch)
        self._check_drafts(batch, drafts, num_cached)
        self._check_counters(counted)
        self._finish_some()

    def slot(self, request: Request, position: int) -> int:
        return oracle.slot(request.block_ids, position, self.setup.block_size)

    # ------------------------------------------------------------ scheduler

    def _chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _random_tokens(self, num_tokens: int) -> list[int]:
        return [self.rng.randrange(oracle.VOCAB_SIZE) for _ in range(num_tokens)]

    def _schedule(self) -> None:
        self.num_scheduled: dict[str, int] = {}
        self.admitted: list[Request] = []
        self.num_hit: dict[str, int] = {}
        self.extended: list[tuple[Request, list[int]]] = []
        self._budget = self.setup.token_budget
        self._preempted: list[Request] = []
        if self._chance(0.05) and self.running:
            self._preempt(self.rng.choice(self.running))
        for request in self.rng.sample(self.running, len(self.running)):
            if request in self.running:  # not preempted meanwhile
                self._schedule_running(request)
        while len(self.running) + len(self.waiting) < self.setup.max_num_reqs:
            self.waiting.append(self._new_request())
        for request in self.rng.sample(self.waiting, len(self.waiting)):
            if request not in self._preempted and self._chance(0.7):
                self._admit(request)

    def _new_request(self) -> Request:
        text = self.rng.choice(self._texts)
        shared = text[: self.rng.randrange(self.setup.max_model_len - 2)]
        prompt = shared + self._random_tokens(self.rng.randint(0 if shared else 1, 3))
        prompt = prompt[: self.setup.max_model_len - 2]
        if self._old_req_ids and self._chance(0.1):
            req_id = self._old_req_ids.pop()
        else:
            self._num_req_ids += 1
            req_id = f"r{self._num_req_ids}"
        return Request(req_id, prompt, len(prompt))

    def _schedule_running(self, request: Request) -> None:
        if self._chance(0.15):
            self.seen["left out with drafts"] += bool(request.drafts)
            return
        num_drafts = len(request.drafts)
        if self._chance(0.25):
            num_drafts = self.rng.randint(0, num_drafts)
        missing = len(request.tokens) - request.num_computed_tokens
        num_scheduled = min(missing + num_drafts, self._budget)
        if request.is_prefill and self._chance(0.5):
            num_scheduled = self.rng.randint(1, max(1, num_scheduled - 1))
        if not 1 <= num_scheduled <= self._budget:
            return
        while (num_fresh := self._num_blocks_missing(request, num_scheduled)) > len(
            self.pool.free
        ):
            self._preempt(
                self.rng.choice(
                    [r for r in self.running if r.req_id not in self.num_scheduled]
                )
            )
            if request not in self.running:
                return
        if num_fresh:
            self.extended.append((request, self._give_fresh(request, num_fresh)))
        self._take_tokens(request, num_scheduled)

    def _admit(self, request: Request) -> None:
        hit = self.pool.take_cached(request.tokens, self.setup.block_size)
        request.block_ids = hit
        request.num_computed_tokens = len(hit) * self.setup.block_size
        missing = len(request.tokens) - request.num_computed_tokens
        num_scheduled = min(missing, self._budget)
        if num_scheduled > 1 and self._chance(0.4):
            num_scheduled = self.rng.randint(1, num_scheduled - 1)
        num_fresh = self._num_blocks_missing(request, num_scheduled)
        if num_scheduled < 1 or num_fresh > len(self.pool.free):
            self._reset(request)
            return
        self.seen["resumed"] += request.admission >= 0
        self.seen["cache hit"] += bool(hit)
        request.admission = self._num_admissions
        self._num_admissions += 1
        request.block_ids = list(hit)
        self._give_fresh(request, num_fresh)
        self.num_hit[request.req_id] = len(hit)
        self.waiting.remove(request)
        self.running.append(request)
        self.admitted.append(request)
        self._take_tokens(request, num_scheduled)

    def _num_blocks_missing(self, request: Request, num_scheduled: int) -> int:
        """With room for the drafts of this step, as vLLM's num_lookahead_tokens."""
        end = request.num_computed_tokens + num_scheduled + self.setup.num_spec_tokens
        end = min(end, self.setup.max_model_len)
        return max(0, -(-end // self.setup.block_size) - len(request.block_ids))

    def _give_fresh(self, request: Request, num_blocks: int) -> list[int]:
        fresh = self.pool.take_fresh(num_blocks)
        size = self.setup.block_size
        for block_id in fresh:
            for vouched in self.vouched[block_id * size : (block_id + 1) * size]:
                self.seen["block reused"] += bool(vouched)
                vouched.clear()  # the old K/V stays, but nobody may count on it
        request.block_ids.extend(fresh)
        return fresh

    def _take_tokens(self, request: Request, num_scheduled: int) -> None:
        self.num_scheduled[request.req_id] = num_scheduled
        self._budget -= num_scheduled
        end = request.num_computed_tokens + num_scheduled
        num_drafts = max(0, end - len(request.tokens))
        self.seen["trimmed"] += 0 < num_drafts < len(request.drafts)
        self.seen["chunked"] += end < len(request.tokens)
        request.drafts = request.drafts[:num_drafts]
        for i in range(min(end, len(request.tokens)) // self.setup.block_size):
            text = tuple(request.tokens[: (i + 1) * self.setup.block_size])
            self.pool.remember(request.block_ids[i], text)

    def _preempt(self, request: Request) -> None:
        self.seen["preempted"] += 1
        self.running.remove(request)
        self.waiting.append(request)
        self._preempted.append(request)
        self._reset(request)

    def _reset(self, request: Request) -> None:
        self.pool.give_back(request.block_ids)
        request.block_ids, request.drafts = [], []
        request.num_computed_tokens = request.num_trusted = 0
        request.has_drafted = False

    def _abort_some(self) -> None:
        for request in [r for r in self.running + self.waiting if self._chance(0.03)]:
            self.seen["aborted"] += 1
            self._end(request)

    def _finish_some(self) -> None:
        for request in list(self.batch):
            is_full = len(request.tokens) >= self.setup.max_model_len
            if is_full or (not request.is_prefill and self._chance(0.05)):
                self.seen["full"] += is_full
                self._end(request)

    def _end(self, request: Request) -> None:
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        self._reset(request)
        if request.admission >= 0:
            self.finished.append(request.req_id)
            self._old_req_ids.append(request.req_id)
            self._texts.append(request.tokens)

    # ------------------------------------------------------------ worker

    def _tell_worker(self) -> None:
        self.proposer.release(self.finished)
        self.finished = []
        size = self.setup.block_size
        self.cursor.update_blocks(
            [
                AdmittedRequest(
                    r.req_id, tuple(r.block_ids), self.num_hit[r.req_id] * size
                )
                for r in self.admitted
            ],
            [(r.req_id, tuple(block_ids)) for r, block_ids in self.extended],
        )
        for request in self.admitted:
            request.num_trusted = self._num_trusted(request)

    def _num_trusted(self, request: Request) -> int:
        """Leading hit blocks of which every slot was written and never doubted."""
        num_hit = self.num_hit[request.req_id] * self.setup.block_size
        num_trusted = 0
        while (
            self.setup.trust_cached_blocks
            and num_trusted < num_hit
            and self.vouched[self.slot(request, num_trusted)]
        ):
            num_trusted += 1
        self.seen["hit not whole"] += num_trusted < num_hit
        return num_trusted - num_trusted % self.setup.block_size

    def _num_cached(self, request: Request) -> int:
        """The naive cursor: leading tokens this request has right draft K/V of."""
        for position in range(request.num_trusted, len(request.tokens)):
            if request.admission not in self.vouched[self.slot(request, position)]:
                return position
        return len(request.tokens)

    def _verify(self) -> DraftBatch:
        """The target's forward and sampling. Returns what the proposer is given."""
        self.batch = [r for r in self.running if r.req_id in self.num_scheduled]
        self.rng.shuffle(self.batch)
        prefilled, is_sampling = [], []
        for request in self.batch:
            end = request.num_computed_tokens + self.num_scheduled[request.req_id]
            prefilled.append(end)
            is_sampling.append(end >= len(request.tokens))
            if is_sampling[-1]:
                self._sample(request)
            else:
                request.num_computed_tokens = end
        return self._draft_batch(prefilled, is_sampling)

    def _sample(self, request: Request) -> None:
        drafts = request.drafts
        num_accepted = len(drafts)
        if self._chance(0.5):
            num_accepted = self.rng.randint(0, len(drafts))
        bonus = self.rng.randrange(oracle.VOCAB_SIZE)
        if num_accepted < len(drafts) and bonus == drafts[num_accepted]:
            bonus = (bonus + 1) % oracle.VOCAB_SIZE
        self.cursor.record_verified(request.req_id, num_accepted)
        request.num_computed_tokens = len(request.tokens) + num_accepted
        request.tokens = [*request.tokens, *drafts[:num_accepted], bonus]
        request.drafts = []
        allocated = len(request.block_ids) * self.setup.block_size
        for position in range(request.num_computed_tokens, allocated):
            self.vouched[self.slot(request, position)].discard(request.admission)

    def _draft_batch(
        self, prefilled: list[int], is_sampling: list[bool]
    ) -> DraftBatch:
        setup, num_reqs = self.setup, len(self.batch)
        token_ids = np.full((setup.max_num_reqs, setup.max_model_len), -9, np.int32)
        block_table = np.full(
            (setup.max_num_reqs, setup.max_blocks_per_req), 10_000, np.int32
        )
        for i, request in enumerate(self.batch):
            token_ids[i, : len(request.tokens)] = request.tokens
            block_table[i, : len(request.block_ids)] = request.block_ids
        self.drafter.start_step(self.batch, block_table)
        num_tokens = np.array([len(r.tokens) for r in self.batch], dtype=np.int64)
        room = np.minimum(
            setup.max_model_len - num_tokens - 1,
            setup.drafter_max_model_len - num_tokens + 1,
        )
        return DraftBatch(
            req_ids=[r.req_id for r in self.batch],
            token_ids=token_ids,
            num_tokens=num_tokens,
            num_prompt_tokens=np.array(
                [r.num_prompt_tokens for r in self.batch], dtype=np.int64
            ),
            num_prefilled_tokens=np.array(prefilled, dtype=np.int64),
            is_sampling=np.array(is_sampling, dtype=bool).reshape(num_reqs),
            max_draft_tokens=np.clip(room, 0, setup.num_spec_tokens),
        )

    # ------------------------------------------------------------ checks

    def _check_drafts(
        self, batch: DraftBatch, drafts: list[list[int]], num_cached: list[int]
    ) -> None:
        """Drafts, rows and cursors are those of a naive drafter of each request."""
        sampling = batch.is_sampling.tolist()
        lens = [n if s else 0 for n, s in zip(self.policy.asked, sampling, strict=True)]
        prefilled = batch.num_prefilled_tokens.tolist()
        limit = self.setup.drafter_max_model_len
        ends = [
            len(r.tokens) if lens[i] else 0 if sampling[i] else min(prefilled[i], limit)
            for i, r in enumerate(self.batch)
        ]
        wanted = [max(0, e - c) for e, c in zip(ends, num_cached, strict=True)]
        granted = oracle.granted(wanted, self.setup.max_num_rows)
        lens = [n if granted[i] == wanted[i] else 0 for i, n in enumerate(lens)]
        first = [
            (i, list(range(num_cached[i], num_cached[i] + granted[i])))
            for i in range(batch.num_reqs)
            if granted[i]
        ]
        later = [
            [(i, [len(r.tokens) + j - 1]) for i, r in enumerate(self.batch) if lens[i] > j]
            for j in range(1, max(lens, default=0))
        ]
        assert self.drafter.fed == ([first, *later] if first else [])
        for i, request in enumerate(self.batch):
            assert drafts[i] == oracle.drafts(request.tokens, lens[i])
            self._check_costs(request, i, lens[i])
            if sampling[i] and self.policy.asked[i] == 0:
                assert granted[i] == 0, "pays without drafting"
                self.seen["paused"] += 1
            cursor = self.cursor.draft_len(request.req_id)
            assert cursor == num_cached[i] + granted[i]
            assert not lens[i] or cursor == len(request.tokens), "not caught up"
            self.seen["caught up"] += wanted[i] > 2 and lens[i] > 0
            self.seen["chunk of catch-up"] += 0 < granted[i] < wanted[i]
            request.drafts, request.has_drafted = drafts[i], lens[i] > 0

    def _check_costs(self, request: Request, req_idx: int, num_drafts: int) -> None:
        rows = [
            len(positions)
            for forward in self.drafter.fed
            for fed_req_idx, positions in forward
            if fed_req_idx == req_idx
        ]
        if num_drafts and request.has_drafted:
            self.seen["drafted twice running"] += 1
            assert rows[0] in (1, 2)
            assert sum(rows) <= self.setup.num_spec_tokens + 1

    def _check_counters(self, before: dict[str, int]) -> None:
        spans = [span for forward in self.drafter.fed for span in forward]
        counted = {k: v - before[k] for k, v in self.counters.as_dict().items()}
        expected = dict.fromkeys(counted, 0) | {
            "num_draft_forwards": len(self.drafter.fed),
            "num_draft_rows": sum(len(positions) for _, positions in spans),
            "num_draft_rows_decode": sum(
                position >= self.batch[i].num_prompt_tokens
                for i, positions in spans
                for position in positions
            ),
        }
        assert counted == expected
