"""The simulated scheduler with a proposer that needs no model."""

from __future__ import annotations

import random
from collections import Counter

from tests.oracle import VOCAB_SIZE
from tests.unit.simulated_scheduler import Request, Scheduler, Setup
from vllm_emssd.proposers.base import DraftBatch, Proposer


class PlannedFailureError(Exception):
    """What failing parts raise here."""


class ProposingEngine:
    def __init__(self, setup: Setup, proposer: Proposer) -> None:
        self._setup, self._rng = setup, random.Random(setup.seed)
        self._scheduler = Scheduler(setup, self._rng)
        self._proposer = proposer
        self.seen = self._scheduler.seen
        self.drafts: dict[str, list[int]] = {}  # of the last step

    def run(self) -> Counter[str]:
        for _ in range(self._setup.num_steps):
            self.step()
        return self.seen

    def step(self) -> None:
        schedule = self._scheduler.schedule()
        self._proposer.release(schedule.finished)
        requests = list(schedule.num_scheduled)
        batch = self._scheduler.forward(schedule, requests, self._record)
        proposed = self._propose(requests, batch)
        for request, drafts in zip(requests, proposed, strict=True):
            request.drafts = drafts
            self.seen["drafts"] += len(drafts)
        self.drafts = {request.req_id: request.drafts for request in requests}
        self._scheduler.finish()

    def _record(self, request: Request, *verified: int) -> None:
        self._proposer.record_verified(request.req_id, *verified)

    def _propose(self, requests: list[Request], batch: DraftBatch) -> list[list[int]]:
        drafts = self._proposer.propose(batch)
        assert len(drafts) == len(requests)
        for i, tokens in enumerate(drafts):
            most = batch.max_draft_tokens[i] if batch.is_sampling[i] else 0
            assert len(tokens) <= most
            assert all(type(t) is int and 0 <= t < VOCAB_SIZE for t in tokens)
        return drafts
