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
from tests.unit.proposing_engine import PlannedFailureError
from tests.unit.simulated_scheduler import Request, Schedule, Scheduler, Setup
from vllm_emssd.draft_cursor import DraftCursor
from vllm_emssd.draft_length import DraftLengthPolicy, StepInfo
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers.base import DraftBatch, Proposer
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.ragged import RaggedRows


class PagedKv:
    """Draft K/V by slot, and what is known of it.

    `_vouched[slot]` holds the admissions that fed a token there which is known to
    belong there. Drafts count until the target judges them; those that it did not
    accept count no more, even where the value happens to be right.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._values = [-1] * (setup.num_blocks * setup.block_size)
        self._vouched: list[set[int]] = [set() for _ in self._values]
        self._num_trusted: dict[Request, int] = {}

    def slot(self, request: Request, position: int) -> int:
        return oracle.slot(request.block_ids, position, self._setup.block_size)

    def apply(self, schedule: Schedule) -> None:
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
        """The naive cursor: leading known tokens that need not be fed any more, as
        the request fed them itself or others have by now made their block whole."""
        position, size = 0, self._setup.block_size
        while position < len(request.tokens):
            if self.has_fed(request, position):
                position += 1
            elif position % size == 0 and self._is_whole_hit(request, position):
                position += size
            else:
                break
        return position

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

    def confidence_after(self, request: Request, position: int) -> float:
        return oracle.confidence_after(self._values[self.slot(request, position)])

    def forget_unaccepted(self, request: Request) -> None:
        allocated = len(request.block_ids) * self._setup.block_size
        for position in range(request.num_computed_tokens, allocated):
            self._vouched[self.slot(request, position)].discard(request.admission)

    def forget_fed(self, request: Request, position: int) -> None:
        """What a forward wrote that failed is to be written again."""
        self._vouched[self.slot(request, position)].discard(request.admission)

    def _find_trusted(self, request: Request) -> int:
        start = 0
        while self._is_whole_hit(request, start):
            start += self._setup.block_size
        return start

    def _is_whole_hit(self, request: Request, start: int) -> bool:
        """Whether the block from `start` on was hit, and is known to be right."""
        if not self._setup.trust_cached_blocks or start >= request.num_hit_tokens:
            return False
        positions = range(start, start + self._setup.block_size)
        return all(self._vouched[self.slot(request, p)] for p in positions)


class RandomLengths(DraftLengthPolicy):
    """A policy that now asks for all, now for nothing, now for anything; stops
    requests in mid-draft, trims, and pauses the feeding of prompts. It keeps what it
    was told and what it answered, to be compared with what should have happened.
    """

    def __init__(self, rng: random.Random, setup: Setup) -> None:
        self._rng, self._always = rng, setup.drafts_always
        self._failure_chance = setup.failure_chance
        self.needs_confidence = setup.returns_confidence
        self.feeds_prompts = True
        self.observed: list[tuple[str, int, int]] = []
        self.released: list[str] = []

    def start_step(self) -> None:
        self.step: StepInfo | None = None
        self.asked: list[int] = []
        self.stopped: dict[int, int] = {}  # request -> drafts made when told to stop
        self.went_on: list[tuple[list[int], list[float] | None]] = []
        self.made: list[int] | None = None
        self.kept: list[int] | None = None

    def skips_step(self, num_sampling: int) -> bool:
        assert self.step is None, "asked too late"
        return not self._always and self._chance(0.2)

    def plan(self, step: StepInfo) -> np.ndarray:
        self.step = step
        self.feeds_prompts = self._always or self._chance(0.7)
        kind = "most" if self._always else self._rng.choice(("most", "none", "any"))
        self.asked = [
            {"most": most, "none": 0, "any": self._rng.randint(0, most)}[kind]
            for most in step.max_draft_tokens.tolist()
        ]
        self._stop_chance = 0.0 if self._always else self._rng.choice((0.0, 0.3, 0.9))
        return np.array(self.asked, dtype=np.int64)

    def continue_drafting(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        assert position == len(self.went_on)
        told = None if confidence is None else confidence.tolist()
        self.went_on.append((req_indices.tolist(), told))
        mask = [not self._chance(self._stop_chance) for _ in req_indices]
        for i, goes_on in zip(req_indices.tolist(), mask, strict=True):
            if not goes_on:
                self.stopped[i] = position + 1
        return np.array(mask, dtype=bool)

    def trim(self, draft_lens: np.ndarray) -> np.ndarray:
        self.made = draft_lens.tolist()
        trims = not self._always and self._chance(0.4)
        self.kept = [self._rng.randint(0, n) if trims else n for n in self.made]
        return np.array(self.kept, dtype=np.int64)

    def observe(self, req_id: str, num_drafts: int, num_accepted: int) -> None:
        self.observed.append((req_id, num_drafts, num_accepted))
        if self._chance(self._failure_chance):
            raise PlannedFailureError

    def release(self, req_id: str) -> None:
        self.released.append(req_id)

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability


class CheckingDrafter:
    """The draft model: checks every row it is fed and all that the row attends to."""

    def __init__(self, setup: Setup, kv: PagedKv, rng: random.Random) -> None:
        self._block_size, self._kv, self._rng = setup.block_size, kv, rng
        self._failure_chance = setup.failure_chance
        self._returns_confidence = setup.returns_confidence
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
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        assert draft_position == len(self.fed)
        assert rows.query_start_loc[0] == 0
        assert rows.query_start_loc[-1] == rows.num_rows == len(token_ids)
        assert 1 <= rows.num_rows <= self.max_num_rows
        assert len(set(rows.req_indices.tolist())) == rows.num_reqs
        slots = rows.slot_mapping(self._block_table, self._block_size).tolist()
        positions, tokens = rows.positions.tolist(), token_ids.tolist()
        bounds = rows.query_start_loc.tolist()
        self.fed.append([])
        fails_after = self._rows_until_failure(rows.num_rows)
        for i, req_idx in enumerate(rows.req_indices.tolist()):
            span = range(bounds[i], bounds[i + 1])
            for row in span[: max(0, fails_after - bounds[i])]:
                self._feed(req_idx, positions[row], slots[row], tokens[row])
            fed = [positions[row] for row in span]
            assert fed == sorted(set(fed)) != []
            self.fed[-1].append((req_idx, fed))
        if fails_after <= rows.num_rows:
            raise PlannedFailureError
        last_row_to_req_idx = dict(
            zip((b - 1 for b in bounds[1:]), rows.req_indices.tolist(), strict=True)
        )
        return self._sample(
            [(last_row_to_req_idx[r], positions[r]) for r in sampled_rows.tolist()]
        )

    def _rows_until_failure(self, num_rows: int) -> int:
        """Rows written before the forward fails; more than there are if it does not."""
        fails = self._rng.random() < self._failure_chance
        return self._rng.randint(0, num_rows) if fails else num_rows + 1

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

    def _sample(
        self, sampled: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        requests = [(self._requests[i], p) for i, p in sampled]
        tokens = [self._kv.draft_after(*request) for request in requests]
        for (req_idx, _), token in zip(sampled, tokens, strict=True):
            self._drafted[req_idx].append(token)
        confidence = [self._kv.confidence_after(*request) for request in requests]
        return (
            torch.tensor(tokens, dtype=torch.int64),
            np.array(confidence) if self._returns_confidence else None,
        )


class Engine:
    """One simulated deployment: its scheduler, target and worker."""

    def __init__(
        self,
        setup: Setup,
        make_cursor: Callable[..., DraftCursor] = DraftCursor,
        seen_by_proposer: Callable[[RandomLengths], DraftLengthPolicy] = lambda p: p,
    ) -> None:
        self._setup, self._rng = setup, random.Random(setup.seed)
        self.scheduler = Scheduler(setup, self._rng)
        self._seen = self.scheduler.seen
        self._kv = PagedKv(setup)
        self._cursor = make_cursor(
            setup.num_blocks, setup.block_size, setup.trust_cached_blocks
        )
        self._policy = RandomLengths(self._rng, setup)
        self.drafter = CheckingDrafter(setup, self._kv, self._rng)
        self._counters = Counters()
        self._proposer = self._make_proposer(seen_by_proposer(self._policy))

    def _make_proposer(self, policy: DraftLengthPolicy) -> Proposer:
        return DraftModelProposer(self.drafter, self._cursor, policy, self._counters)

    def run(self) -> Counter[str]:
        """Returns how often what happened."""
        for _ in range(self._setup.num_steps):
            self.step()
        return self._seen

    def step(self) -> None:
        schedule = self.scheduler.schedule()
        self._update_blocks(schedule)
        self._requests = self._rng.sample(
            list(schedule.num_scheduled), len(schedule.num_scheduled)
        )
        batch = self._verify(schedule)
        num_cached = [self._kv.num_cached(r) for r in self._requests]
        counted = self._counters.as_dict()
        self._policy.start_step()
        try:
            drafts = self._proposer.propose(batch)
        except PlannedFailureError:
            self._check_failure(num_cached)
        else:
            self._check_drafts(batch, drafts, num_cached)
        self._check_counters(counted)
        self._check_nothing_is_kept_of_others()
        self.scheduler.finish()

    def _update_blocks(self, schedule: Schedule) -> None:
        self._proposer.release(schedule.finished)
        assert self._policy.released == schedule.finished
        self._policy.released = []
        self._cursor.update_blocks(*schedule.block_updates)
        self._kv.apply(schedule)
        for request in schedule.admitted:
            num_trusted = self._kv.num_trusted(request)
            self._seen["cache hit, whole"] += num_trusted > 0
            self._seen["cache hit, not whole"] += num_trusted < request.num_hit_tokens

    def _verify(self, schedule: Schedule) -> DraftBatch:
        """The target's forward and sampling. Returns what the proposer is given."""
        verified = []

        def record(request: Request, *counts: int) -> None:
            verified.append((request.req_id, *counts))
            self._record_verified(*verified[-1])
            self._kv.forget_unaccepted(request)

        batch = self.scheduler.forward(schedule, self._requests, record)
        self._check_observed(verified)
        shape = (self._setup.max_num_reqs, self._setup.max_blocks_per_req)
        block_table = np.full(shape, 10_000, np.int32)
        for i, request in enumerate(self._requests):
            block_table[i, : len(request.block_ids)] = request.block_ids
        self.drafter.start_step(self._requests, block_table)
        return batch

    def _record_verified(self, req_id: str, *verified: int) -> None:
        """As the runner does where the proposer fails."""
        try:
            self._proposer.record_verified(req_id, *verified)
        except PlannedFailureError:
            self._cursor.record_fed_drafts(req_id, 0)
            self._seen["observing failed"] += 1

    def _check_observed(self, verified: list[tuple[str, int, int]]) -> None:
        assert self._policy.observed == verified
        self._policy.observed = []

    def _check_failure(self, num_cached: list[int]) -> None:
        """The step goes on without drafts; no cursor moved, so what was fed is fed
        again."""
        for forward in self.drafter.fed:
            for i, positions in forward:
                for position in positions:
                    self._kv.forget_fed(self._requests[i], position)
        for request, num_before in zip(self._requests, num_cached, strict=True):
            cursor = self._cursor.draft_len(request.req_id)
            assert cursor == self._kv.num_cached(request) == num_before
            request.drafts, request.has_drafted = [], False
        in_mid_draft = len(self.drafter.fed) > 1
        self._seen["failed in mid-draft" if in_mid_draft else "failed at once"] += 1

    def _check_nothing_is_kept_of_others(self) -> None:
        assert set(self._cursor._requests) <= self.scheduler.known_req_ids

    def _check_drafts(
        self, batch: DraftBatch, drafts: list[list[int]], num_cached: list[int]
    ) -> None:
        """Drafts, rows and cursors are what a naive drafter of each request gives."""
        self._check_step(batch, num_cached)
        feeds = self._which_feed(batch, num_cached)
        asked = [
            n if fed else 0 for n, fed in zip(self._policy.asked, feeds, strict=True)
        ]
        wanted = self._wanted_rows(batch, feeds, num_cached)
        granted = oracle.granted(wanted, self._setup.max_num_rows)
        lens = [
            min(n, self._policy.stopped.get(i, n)) if granted[i] == wanted[i] else 0
            for i, n in enumerate(asked)
        ]  # no drafts before all missing tokens are fed
        kept = self._policy.kept if any(granted) else lens
        assert self._policy.made == (lens if any(granted) else None)
        self._check_went_on(lens)
        assert self.drafter.fed == self._naive_forwards(num_cached, granted, lens)
        for i, request in enumerate(self._requests):
            assert drafts[i] == oracle.drafts(request.tokens, kept[i])
            cursor = self._cursor.draft_len(request.req_id)
            assert cursor == self._kv.num_cached(request)
            by_others = cursor - num_cached[i] - granted[i]
            assert by_others >= 0
            self._seen["filled by another"] += by_others > 0
            assert not lens[i] or cursor == len(request.tokens), "not backfilled"
            self._check_costs(request, i, bool(batch.is_sampling[i]), lens[i])
            self._seen["stopped in mid-draft"] += 0 < lens[i] < asked[i]
            self._seen["trimmed by the policy"] += kept[i] < lens[i]
            self._seen["backfilled"] += wanted[i] > 2 and lens[i] > 0
            self._seen["backfill chunked"] += 0 < granted[i] < wanted[i]
            request.drafts, request.has_drafted = drafts[i], lens[i] > 0

    def _check_step(self, batch: DraftBatch, num_cached: list[int]) -> None:
        """The policy is told of every request what drafting it would take."""
        step = self._policy.step
        assert step is not None
        assert list(step.req_ids) == batch.req_ids
        assert step.is_sampling.tolist() == batch.is_sampling.tolist()
        assert step.max_draft_tokens.tolist() == [
            most if sampling else 0
            for most, sampling in zip(
                batch.max_draft_tokens.tolist(), batch.is_sampling, strict=True
            )
        ]
        for i, request in enumerate(self._requests):
            end = min(len(request.tokens), self._setup.drafter_max_model_len)
            if batch.is_sampling[i]:
                assert step.missing_rows[i] == max(0, end - num_cached[i])
        assert step.copies is batch.copies
        assert step.num_prefill_rows == sum(
            scheduled
            for scheduled, sampling in zip(
                batch.num_scheduled_tokens.tolist(), batch.is_sampling, strict=True
            )
            if not sampling
        )

    def _check_went_on(self, lens: list[int]) -> None:
        """It was asked about requests that drafted, each with its own confidence."""
        expected: list[tuple[list[int], list[float] | None]] = []
        for position in range(max(lens, default=0)):
            drafting = [i for i, n in enumerate(lens) if n > position]
            told = [
                oracle.confidence_after(
                    oracle.states(tokens + oracle.drafts(tokens, position))[-1]
                )
                for tokens in (self._requests[i].tokens for i in drafting)
            ]
            expected.append(
                (drafting, told if self._setup.returns_confidence else None)
            )
        assert self._policy.went_on == expected

    def _which_feed(self, batch: DraftBatch, num_cached: list[int]) -> list[bool]:
        """Which requests feed rows, and need not wait for another that is about
        to write the same block."""
        feeds, claimed = [], set()
        for i, request in enumerate(self._requests):
            feeds_prompt = (
                not batch.is_sampling[i]
                and self._policy.feeds_prompts
                and batch.max_draft_tokens[i] > 0
            )
            feeds.append(self._policy.asked[i] > 0 or bool(feeds_prompt))
            block = num_cached[i] // self._setup.block_size
            if feeds[i] and block < len(request.block_ids):
                waits = request.block_ids[block] in claimed
                claimed.add(request.block_ids[block])
                feeds[i] = not waits
                self._seen["waited for another"] += waits
        return feeds

    def _wanted_rows(
        self, batch: DraftBatch, feeds: list[bool], num_cached: list[int]
    ) -> list[int]:
        wanted = []
        for i, request in enumerate(self._requests):
            end = len(request.tokens)
            if not batch.is_sampling[i]:
                end = int(batch.num_prefilled_tokens[i])
            end = min(end, self._setup.drafter_max_model_len)
            wanted.append(max(0, end - num_cached[i]) if feeds[i] else 0)
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
        num_made: int,
    ) -> None:
        rows = [
            len(positions)
            for forward in self.drafter.fed
            for fed_req_idx, positions in forward
            if fed_req_idx == req_idx
        ]
        if is_sampling and not self._policy.asked[req_idx]:
            assert rows == [], "pays without drafting"
            self._seen["paused"] += 1
        if not is_sampling and not self._policy.feeds_prompts:
            assert rows == [], "pays for a prompt without drafting"
            self._seen["prompt put off"] += 1
        if num_made and request.has_drafted:
            assert rows[0] in (1, 2)
            assert sum(rows) <= self._setup.num_spec_tokens + 1
            self._seen["drafted twice running"] += 1

    def _check_counters(self, before: dict[str, int]) -> None:
        spans = [span for forward in self.drafter.fed for span in forward]
        counted = {k: v - before[k] for k, v in self._counters.as_dict().items()}
        expected = dict.fromkeys(counted, 0) | {
            "num_draft_forwards": len(self.drafter.fed),
            "num_draft_rows": sum(len(positions) for _, positions in spans),
            "num_draft_rows_decode": sum(
                position >= self._requests[i].num_prompt_tokens
                for i, positions in spans
                for position in positions
            ),
        }
        assert counted == expected
