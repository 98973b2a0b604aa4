"""A server under attack, step by step: hypothesis chooses what happens next.

Each step has a seed of its own, for what the scheduler, the target and the policy do
in it, so that a failure shrinks to few steps. Every step is checked against the oracle
(see `simulated_worker`).
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.unit.simulated_scheduler import Setup
from tests.unit.simulated_worker import Engine
from tests.unit.test_draft_model import KeepsOldDraftsPending, setups
from vllm_emssd.draft_cursor import DraftCursor

seeds = st.integers(0, 2**32 - 1)


class Server(RuleBasedStateMachine):
    engine: Engine
    make_cursor = DraftCursor

    @initialize(setup=setups())
    def start(self, setup: Setup) -> None:
        self.rng = random.Random(setup.seed)  # of all parts, seeded anew each step
        self.engine = Engine(setup, self.make_cursor, rng=self.rng)

    @rule(seed=seeds)
    def step(self, seed: int) -> None:
        self.rng.seed(seed)
        self.engine.step()

    @rule(seed=seeds)
    def step_whose_forward_fails(self, seed: int) -> None:
        self.rng.seed(seed)
        self.engine.drafter.fails_next = True
        self.engine.step()
        self.engine.drafter.fails_next = False

    @precondition(lambda self: self.engine.scheduler.num_requests)
    @rule(seed=seeds)
    def abort(self, seed: int) -> None:
        self.rng.seed(seed)
        self.engine.scheduler.abort_any()

    @precondition(lambda self: self.engine.scheduler.num_running)
    @rule(seed=seeds)
    def preempt(self, seed: int) -> None:
        self.rng.seed(seed)
        self.engine.scheduler.preempt_any()

    def teardown(self) -> None:
        """Nothing is stuck: with everyone gone, the worker is told so."""
        if not hasattr(self, "engine"):
            return
        while self.engine.scheduler.num_requests:
            self.engine.scheduler.abort_any()
        self.step(0)


class Careless(Server):
    make_cursor = KeepsOldDraftsPending


def run(server: type[Server] = Server, **options: Any) -> None:
    run_state_machine_as_test(
        server, settings=settings(deadline=None, print_blob=True, **options)
    )


def test_survives_all_that_may_happen() -> None:
    run(max_examples=60, stateful_step_count=30, derandomize=True)


def test_careless_server_does_not_survive() -> None:
    with pytest.raises(AssertionError):
        run(
            Careless,
            max_examples=60,
            stateful_step_count=30,
            derandomize=True,
            phases=[Phase.generate],  # no shrinking
            report_multiple_bugs=False,
        )


@pytest.mark.slow
def test_survives_thousands_of_histories() -> None:
    run(max_examples=3000, stateful_step_count=50)
