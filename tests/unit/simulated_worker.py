"""A worker that drives the real cursor and proposer, and checks all they do.

The draft model's K/V is a number that depends on the K/V of all earlier positions,
as in a model: one wrong slot spoils what follows. Nothing is ever erased, so stale
K/V lies about as it does in a cache. What may not happen is an AssertionError.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from tests import oracle
from tests.unit.simulated_scheduler import Request, Schedule, Scheduler, Setup
from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.ragged import RaggedRows


class PagedKv:
    """Draft K/V by slot, and what is known of it.

    `_vouched[slot]` holds the admissions that fed a token there which is known to
    belong there. Drafts count until the target judges them; of those it did not
    accept nobody is sure any more, even where the value happens to be right.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._values = [-1] * (setup.num_blocks * setup.block_size)
        self._vouched: list[set[int]] = [set() for _ in self._values]
        self._num_trusted: dict[Request, int] = {}

    def slot(self, request: Request, position: int) -> int:
        return oracle.slot(request.block_ids, position, self._setup.block_size)

    def take_in(self, schedule: Schedule) -> None:
        size = self._setup.block_size
        for block_id in schedule.fresh_block_ids:
            for slot in range(block_id * size, (block_id + 1) * size):
                self._vouched[slot].clear()
        for request in schedule.admitted:
            self._num_trusted[request] = self._find_trusted(request)

    def num_trusted(self, request: Request) -> int:
        """Tokens of the leading hit blocks that were whole when it was admitted."""
        return self._num_trusted[request]

    def num_cached(self, request: Request) -> int:
        """The naive cursor: leading known tokens that need not be fed any more."""
        for position in range(self.num_trusted(request), len(request.tokens)):
            if not self.has_fed(request, position):
                return position
        return len(request.tokens)

    def has_fed(self, request: Request, position: int) -> bool:
        return request.admission in self._vouched[self.slot(request, position)]

    def feed(self, request: Request, text: list[int], position: int) -> None:
        """Compute a token's K/V from that of all tokens before it."""
        before = [self._values[self.slot(request, p)] for p in range(position)]
        assert before == oracle.states(text[:position]), "attends to wrong K/V"
        state = oracle.next_state(before[-1] if before else 0, text[position])
        slot = self.slot(request, position)
        if self._values[slot] != state:
            self._values[slot] = state
            self._vouched[slot].clear()
        self._vouched[slot].add(request.admission)

    def draft_after(self, request: Request, position: int) -> int:
        return oracle.draft_after(self._values[self.slot(request, position)])

    def forget_unaccepted(self, request: Request) -> None:
        allocated = len(request.block_ids) * self._setup.block_size
        for position in range(request.num_computed_tokens, allocated):
            self._vouched[self.slot(request, position)].discard(request.admission)

    def _find_trusted(self, request: Request) -> int:
        if not self._setup.trust_cached_blocks:
            return 0
        size = self._setup.block_size
        for start in range(0, request.num_hit_tokens, size):
            slots = [self.slot(request, p) for p in range(start, start + size)]
            if not all(self._vouched[slot] for slot in slots):
                return start
        return request.num_hit_tokens


class RandomLengths:
    """A policy that now asks for all, now for nothing, now for anything."""

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
    """The draft model: checks every row it is fed and all that the row attends to."""

    def __init__(self, setup: Setup, kv: PagedKv) -> None:
        self._block_size, self._kv = setup.block_size, kv
        self.max_num_rows = setup.max_num_rows
        self.max_model_len = setup.drafter_max_model_len

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
        slots = rows.slot_mapping(self._block_table, self._block_size).tolist()
        positions, tokens = rows.positions.tolist(), token_ids.tolist()
        bounds = rows.query_start_loc.tolist()
        self.fed.append([])
        for i, req_idx in enumerate(rows.req_indices.tolist()):
            span = range(bounds[i], bounds[i + 1])
            for row in span:
                self._feed(req_idx, positions[row], slots[row], tokens[row])
            fed = [positions[row] for row in span]
            assert fed == sorted(set(fed)) != []
            self.fed[-1].append((req_idx, fed))
        last_row_to_req_idx = dict(
            zip((b - 1 for b in bounds[1:]), rows.req_indices.tolist(), strict=True)
        )
        return self._sample(
            [(last_row_to_req_idx[r], positions[r]) for r in sampled_rows.tolist()]
        )

    def _feed(self, req_idx: int, position: int, slot: int, token: int) -> None:
        request = self._requests[req_idx]
        text = request.tokens + self._drafted[req_idx]
        assert position < self.max_model_len
        assert token == text[position]
        assert position < len(request.block_ids) * self._block_size
        assert slot == self._kv.slot(request, position)
        assert position >= self._kv.num_trusted(request), "known to be right"
        assert not self._kv.has_fed(request, position), "fed twice"
        self._kv.feed(request, text, position)

    def _sample(self, sampled: list[tuple[int, int]]) -> torch.Tensor:
        tokens = [self._kv.draft_after(self._requests[i], p) for i, p in sampled]
        for (req_idx, _), token in zip(sampled, tokens, strict=True):
            self._drafted[req_idx].append(token)
        return torch.tensor(tokens, dtype=torch.int64)


class Engine:
    """One simulated deployment: its scheduler, target and worker."""

    def __init__(
        self, setup: Setup, make_cursor: Callable[..., DraftCursor] = DraftCursor
    ) -> None:
        self._setup, self._rng = setup, random.Random(setup.seed)
        self._scheduler = Scheduler(setup, self._rng)
        self._seen = self._scheduler.seen
        self._kv = PagedKv(setup)
        self._cursor = make_cursor(
            setup.num_blocks, setup.block_size, setup.trust_cached_blocks
        )
        self._policy = RandomLengths(self._rng, setup.drafts_always)
        self._drafter = CheckingDrafter(setup, self._kv)
        self._counters = Counters()
        self._proposer = DraftModelProposer(
            self._drafter, self._cursor, self._policy, self._counters
        )

    def run(self) -> Counter[str]:
        """Returns how often what happened."""
        for _ in range(self._setup.num_steps):
            self._step()
        return self._seen

    def _step(self) -> None:
        schedule = self._scheduler.schedule()
        self._take_in_blocks(schedule)
        self._requests = self._rng.sample(
            list(schedule.num_scheduled), len(schedule.num_scheduled)
        )
        batch = self._verify(schedule)
        num_cached = [self._kv.num_cached(r) for r in self._requests]
        counted = self._counters.as_dict()
        drafts = self._proposer.propose(batch)
        self._check_drafts(batch, drafts, num_cached)
        self._check_counters(counted)
        self._scheduler.finish()

    def _take_in_blocks(self, schedule: Schedule) -> None:
        self._proposer.release(schedule.finished)
        self._cursor.update_blocks(
            [
                AdmittedRequest(r.req_id, tuple(r.block_ids), r.num_hit_tokens)
                for r in schedule.admitted
            ],
            [(r.req_id, tuple(block_ids)) for r, block_ids in schedule.extended],
        )
        self._kv.take_in(schedule)
        for request in schedule.admitted:
            num_trusted = self._kv.num_trusted(request)
            self._seen["cache hit, whole"] += num_trusted > 0
            self._seen["cache hit, not whole"] += num_trusted < request.num_hit_tokens

    def _verify(self, schedule: Schedule) -> DraftBatch:
        """The target's forward and sampling. Returns what the proposer is given."""
        prefilled, is_sampling = [], []
        for request in self._requests:
            end = request.num_computed_tokens + schedule.num_scheduled[request]
            prefilled.append(end)
            is_sampling.append(end >= len(request.tokens))
            if is_sampling[-1]:
                num_accepted = self._scheduler.verify(request)
                self._cursor.record_verified(request.req_id, num_accepted)
                self._kv.forget_unaccepted(request)
            else:
                request.num_computed_tokens = end
        return self._draft_batch(prefilled, is_sampling)

    def _draft_batch(self, prefilled: list[int], is_sampling: list[bool]) -> DraftBatch:
        setup = self._setup
        token_ids = np.full((setup.max_num_reqs, setup.max_model_len), -9, np.int32)
        block_table = np.full(
            (setup.max_num_reqs, setup.max_blocks_per_req), 10_000, np.int32
        )
        for i, request in enumerate(self._requests):
            token_ids[i, : len(request.tokens)] = request.tokens
            block_table[i, : len(request.block_ids)] = request.block_ids
        self._drafter.start_step(self._requests, block_table)
        num_tokens = np.array([len(r.tokens) for r in self._requests], np.int64)
        num_prompt_tokens = [r.num_prompt_tokens for r in self._requests]
        room = np.minimum(
            setup.max_model_len - num_tokens - 1,
            setup.drafter_max_model_len - num_tokens + 1,
        )
        return DraftBatch(
            req_ids=[r.req_id for r in self._requests],
            token_ids=token_ids,
            num_tokens=num_tokens,
            num_prompt_tokens=np.array(num_prompt_tokens, np.int64),
            num_prefilled_tokens=np.array(prefilled, np.int64),
            is_sampling=np.array(is_sampling, bool),
            max_draft_tokens=np.clip(room, 0, setup.num_spec_tokens),
        )

    def _check_drafts(
        self, batch: DraftBatch, drafts: list[list[int]], num_cached: list[int]
    ) -> None:
        """Drafts, rows and cursors are what a naive drafter of each request gives."""
        asked = np.where(batch.is_sampling, self._policy.asked, 0).tolist()
        wanted = self._wanted_rows(batch, asked, num_cached)
        granted = oracle.granted(wanted, self._setup.max_num_rows)
        lens = [
            n if granted[i] == wanted[i] else 0 for i, n in enumerate(asked)
        ]  # who has not caught up does not draft
        assert self._drafter.fed == self._naive_forwards(num_cached, granted, lens)
        for i, request in enumerate(self._requests):
            assert drafts[i] == oracle.drafts(request.tokens, lens[i])
            cursor = self._cursor.draft_len(request.req_id)
            assert cursor == num_cached[i] + granted[i] == self._kv.num_cached(request)
            assert not drafts[i] or cursor == len(request.tokens), "not caught up"
            self._check_costs(
                request, i, bool(batch.is_sampling[i]), asked[i], drafts[i]
            )
            self._seen["caught up"] += wanted[i] > 2 and lens[i] > 0
            self._seen["catch-up chunked"] += 0 < granted[i] < wanted[i]
            request.drafts, request.has_drafted = drafts[i], bool(drafts[i])

    def _wanted_rows(
        self, batch: DraftBatch, asked: list[int], num_cached: list[int]
    ) -> list[int]:
        wanted = []
        for i, request in enumerate(self._requests):
            end = 0
            if asked[i]:
                end = len(request.tokens)
            elif not batch.is_sampling[i]:
                end = int(batch.num_prefilled_tokens[i])
            end = min(end, self._setup.drafter_max_model_len)
            wanted.append(max(0, end - num_cached[i]))
        return wanted

    def _naive_forwards(
        self, num_cached: list[int], granted: list[int], lens: list[int]
    ) -> list[list[tuple[int, list[int]]]]:
        """Positions of each request fed in each forward."""
        first = [
            (i, list(range(num_cached[i], num_cached[i] + num_rows)))
            for i, num_rows in enumerate(granted)
            if num_rows
        ]
        later = [
            [
                (i, [len(request.tokens) + j - 1])
                for i, request in enumerate(self._requests)
                if lens[i] > j
            ]
            for j in range(1, max(lens, default=0))
        ]
        return [first, *later] if first else []

    def _check_costs(
        self,
        request: Request,
        req_idx: int,
        is_sampling: bool,
        asked: int,
        drafts: list[int],
    ) -> None:
        rows = [
            len(positions)
            for forward in self._drafter.fed
            for fed_req_idx, positions in forward
            if fed_req_idx == req_idx
        ]
        if is_sampling and not asked:
            assert rows == [], "pays without drafting"
            self._seen["paused"] += 1
        if drafts and request.has_drafted:
            assert rows[0] in (1, 2)
            assert sum(rows) <= self._setup.num_spec_tokens + 1
            self._seen["drafted twice running"] += 1

    def _check_counters(self, before: dict[str, int]) -> None:
        spans = [span for forward in self._drafter.fed for span in forward]
        counted = {k: v - before[k] for k, v in self._counters.as_dict().items()}
        expected = dict.fromkeys(counted, 0) | {
            "num_draft_forwards": len(self._drafter.fed),
            "num_draft_rows": sum(len(positions) for _, positions in spans),
            "num_draft_rows_decode": sum(
                position >= self._requests[i].num_prompt_tokens
                for i, positions in spans
                for position in positions
            ),
        }
        assert counted == expected
