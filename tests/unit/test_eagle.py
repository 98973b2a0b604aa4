"""The EAGLE proposer over vLLM's own scheduler, with a head and a target made up.

A head's K/V is the text that it depends on, a target's hidden state is a number of the
text up to its token. So whatever a draft attends to can be compared with its text.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from tests.unit.simulated_scheduler import Request, Scheduler, Setup
from vllm_emssd.draft_cursor import DraftCursor
from vllm_emssd.draft_length import DraftLengthPolicy, StepInfo
from vllm_emssd.metrics import Counters
from vllm_emssd.proposers import eagle
from vllm_emssd.proposers.draft_model import DraftModelProposer
from vllm_emssd.proposers.eagle import EagleProposer
from vllm_emssd.proposers.hidden_states import HiddenStates
from vllm_emssd.ragged import RaggedRows

REJECTED = -1.0  # hidden states of rejected drafts, which must not be used
STATE_BYTES = 4


def state_of(text: list[int]) -> float:
    """The target's hidden state at the last token of a text."""
    return float(hash(tuple(text)) % 2**20)


class Head:
    """Checks each row it is fed, and all that its drafts attend to."""

    returns_confidence = False

    def __init__(self, setup: Setup, states: HiddenStates, cursor: DraftCursor) -> None:
        self.max_num_rows = setup.max_num_rows
        self.max_model_len = setup.drafter_max_model_len
        self._block_size, self._states, self._cursor = setup.block_size, states, cursor
        self._texts: dict[int, tuple[int, ...]] = {}  # by slot
        self.requests: list[Request] = []  # by batch row
        self.num_first_rows: list[int] = []  # likewise, of the step's first forward

    def start_step(self, requests: list[Request]) -> None:
        self.requests, self.num_first_rows = requests, [0] * len(requests)

    def forward(
        self,
        rows: RaggedRows,
        token_ids: np.ndarray | torch.Tensor,
        sampled_rows: np.ndarray,
        draft_position: int,
    ) -> tuple[torch.Tensor, None]:
        for i, position, token in zip(
            rows.row_req_indices,
            rows.positions.tolist(),
            token_ids.tolist(),
            strict=True,
        ):
            request = self.requests[i]
            text = (-1,)  # of a draft: nobody else may take it for known text
            if draft_position == 0:
                self.num_first_rows[i] += 1
                self._check_row(request, position, token)
                text = tuple(request.tokens[: position + 2])
            self._texts[self._slot(request, position)] = text
        for i, position in zip(
            rows.row_req_indices[sampled_rows],
            rows.positions[sampled_rows],
            strict=True,
        ):
            self._check_context(self.requests[i], int(position) - draft_position)
        return torch.zeros(len(sampled_rows), dtype=torch.int64), None

    def kv_slots(self, rows: RaggedRows) -> np.ndarray:
        each = zip(rows.row_req_indices, rows.positions.tolist(), strict=True)
        return np.array([self._slot(self.requests[i], p) for i, p in each])

    def _check_row(self, request: Request, position: int, token: int) -> None:
        assert token == request.tokens[position + 1]
        state = self._states.of(torch.tensor([self._slot(request, position)]))
        assert state.item() == state_of(request.tokens[: position + 1])

    def _check_context(self, request: Request, last: int) -> None:
        """It drafts after all that is known, and attends to K/V of its own text."""
        assert last == len(request.tokens) - 2
        for position in range(self._cursor.first(request.req_id), last + 1):
            text = self._texts[self._slot(request, position)]
            known = tuple(request.tokens[: position + 2])
            if self._is_last_of_hit(request, position):
                text, known = text[:-1], known[:-1]
            assert text == known, position

    def _is_last_of_hit(self, request: Request, position: int) -> bool:
        """vLLM's cache goes by a block's tokens: the one behind may be another's."""
        is_last = (position + 1) % self._block_size == 0
        return is_last and position < request.num_hit_tokens

    def _slot(self, request: Request, position: int) -> int:
        block, within = divmod(position, self._block_size)
        return request.block_ids[block] * self._block_size + within


class OnAndOff(DraftLengthPolicy):
    """Drafts for some steps, then for none, of all requests or of some."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._is_on = rng, True

    def skips_step(self, num_sampling: int) -> bool:
        if self._rng.random() < 0.2:
            self._is_on = not self._is_on
            self.feeds_prompts = self._is_on
        return not self._is_on

    def plan(self, step: StepInfo) -> np.ndarray:
        some = [n if self._rng.random() < 0.8 else 0 for n in step.max_draft_tokens]
        return np.array(some, dtype=np.int64)


class Engine:
    def __init__(self, setup: Setup, max_states: int) -> None:
        self._setup, self._rng = setup, random.Random(setup.seed)
        self._scheduler = Scheduler(setup, self._rng)
        self.seen = self._scheduler.seen
        self._states = HiddenStates(
            setup.num_blocks,
            setup.block_size,
            setup.token_budget,
            max_states * STATE_BYTES,
        )
        self._cursor = DraftCursor(setup.num_blocks, setup.block_size)
        self._head = Head(setup, self._states, self._cursor)
        self.counters, self._policy = Counters(), OnAndOff(self._rng)
        self._proposer = eagle.EagleProposer(
            self._head,
            self._cursor,
            self._policy,
            self.counters,
            states=self._states,
            kv_slots=self._head.kv_slots,
            block_size=setup.block_size,
        )
        self._drafted_before: set[str] = set()

    def run(self) -> Counter[str]:
        for _ in range(self._setup.num_steps):
            self._step()
        self.seen["restarted"] += self.counters.num_draft_restarts
        return self.seen

    def _step(self) -> None:
        schedule = self._scheduler.schedule()
        self._proposer.release(schedule.finished)
        self._states.forget(self._cursor.update_blocks(*schedule.block_updates))
        self._drafted_before -= {r.req_id for r in schedule.admitted}
        requests = list(schedule.num_scheduled)
        if not requests:  # no forward, no proposal
            self._scheduler.finish()
            return
        self._rng.shuffle(requests)
        batch = self._scheduler.forward(schedule, requests, self._record)
        drafts: list[list[int]] = [[] for _ in requests]
        self._head.start_step(requests)
        ends = batch.num_prefilled_tokens
        self._keep_states(
            requests,
            RaggedRows.from_spans(
                np.arange(len(requests)), ends - batch.num_scheduled_tokens, ends
            ),
        )
        if not self._proposer.skips_step(int(batch.is_sampling.sum())):
            drafts = self._proposer.propose(batch)
        self._check_rows(requests, drafts)
        for request, tokens in zip(requests, drafts, strict=True):
            request.drafts = tokens
        self._scheduler.finish()

    def _record(self, request: Request, _: int, num_accepted: int) -> None:
        self._proposer.record_verified(request.req_id, 0, num_accepted)

    def _keep_states(self, requests: list[Request], rows: RaggedRows) -> None:
        states = [
            state_of(requests[i].tokens[: p + 1])
            if p < requests[i].num_computed_tokens
            else REJECTED
            for i, p in zip(rows.row_req_indices, rows.positions, strict=True)
        ]
        kv_slots = torch.from_numpy(self._head.kv_slots(rows))
        self._states.keep([torch.tensor(states)[:, None]], kv_slots)

    def _check_rows(self, requests: list[Request], drafts: list[list[int]]) -> None:
        """A request that drafts twice running is fed its new tokens, no more."""
        drafted = {r.req_id for r, d in zip(requests, drafts, strict=True) if d}
        for request, num_rows in zip(requests, self._head.num_first_rows, strict=True):
            if request.req_id in drafted & self._drafted_before:
                assert num_rows == len(request.sampled)
                assert num_rows <= self._setup.num_spec_tokens + 1
                self.seen["drafted twice running"] += 1
            self.seen["backfilled"] += num_rows > self._setup.num_spec_tokens + 1
        self._drafted_before = drafted


def run_all(max_states: int = 10_000) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(40):
        setup = Setup(seed, num_steps=50, has_head=True, block_size=2 + seed % 4)
        seen += Engine(setup, max_states).run()
    return seen


def test_rows_and_context_are_those_of_the_text() -> None:
    seen = run_all()
    for what in ("preempted", "resumed", "backfilled", "drafted twice running"):
        assert seen[what] >= 20, what


def test_the_text_begins_anew_only_where_few_states_are_kept() -> None:
    assert run_all()["restarted"] == 0
    assert run_all(max_states=6)["restarted"] > 20


class TakesStatesThatAreGone(EagleProposer):
    def _missing_spans(self, batch):  # type: ignore
        return DraftModelProposer._missing_spans(self, batch)


class CountsAcceptedDrafts(EagleProposer):
    """As if their K/V were that of the target's hidden states."""

    _keeps_fed_drafts = True


class GoesOnBehindGaps(EagleProposer):
    def _start_feeding(self, batch, fed, starts):  # type: ignore
        super()._start_feeding(batch, fed, starts)
        for i in fed:
            self._cursor._requests[batch.req_ids[i]].first = 0


class TakesTheTokenAtTheRow(EagleProposer):
    _token_offset = 0


@pytest.mark.parametrize(
    "planted",
    [
        CountsAcceptedDrafts,
        GoesOnBehindGaps,
        TakesStatesThatAreGone,
        TakesTheTokenAtTheRow,
    ],
)
def test_planted_errors_are_caught(
    planted: type[EagleProposer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eagle, "EagleProposer", planted)
    with pytest.raises((AssertionError, KeyError)):
        run_all(max_states=6)
