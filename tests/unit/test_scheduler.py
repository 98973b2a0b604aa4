"""Placeholder drafts cost rows: they are unscheduled, and nothing else is."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_emssd.integration import scheduler
from vllm_emssd.integration.scheduler import UnpadAsyncScheduler, UnpadScheduler
from vllm_emssd.integration.v2.pending_steps import PendingStep
from vllm_emssd.integration.v2.ragged_speculator import RaggedSpeculator
from vllm_emssd.verification import ScheduledStep


def output_of(drafts: list[list[int] | None], num_other: list[int]) -> SimpleNamespace:
    """`drafts[i]` of request i, None where it has no entry, besides other tokens."""
    num_scheduled = {
        f"r{i}": num_other[i] + len(tokens or ()) for i, tokens in enumerate(drafts)
    }
    return SimpleNamespace(
        scheduled_spec_decode_tokens={
            f"r{i}": list(tokens)
            for i, tokens in enumerate(drafts)
            if tokens is not None
        },
        num_scheduled_tokens=num_scheduled,
        total_num_scheduled_tokens=sum(num_scheduled.values()),
    )


@pytest.mark.parametrize("kind", [UnpadScheduler, UnpadAsyncScheduler])
def test_placeholders_go_and_real_drafts_stay(
    monkeypatch: pytest.MonkeyPatch, kind: type[UnpadScheduler]
) -> None:
    """New and resumed requests have placeholders; drafts of the others are -1 too
    where scheduling is asynchronous."""
    told: list[Any] = []
    for stock in (Scheduler, AsyncScheduler):
        monkeypatch.setattr(
            stock, "_update_after_schedule", lambda self, output: told.append(output)
        )
    new, resumed, without, running = [-1, -1], [-1], None, [-1, -1, -1]
    output = output_of([new, resumed, without, running], [1, 2, 3, 4])
    admitted = {
        "scheduled_new_reqs": [SimpleNamespace(req_id=r) for r in ("r0", "r2")],
        "scheduled_cached_reqs": SimpleNamespace(resumed_req_ids={"r1"}),
    }
    vars(output).update(admitted)
    kind._update_after_schedule(object.__new__(kind), output)  # type: ignore[arg-type]
    expected = output_of([None, None, None, running], [1, 2, 3, 4])
    vars(expected).update(admitted)
    assert told == [expected]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 9), st.none() | st.integers(0, 7)),
        max_size=6,
    )
)
def test_drafts_not_made_are_left_out(
    requests: list[tuple[int, int, int | None]],
) -> None:
    """Of a copy: the scheduler goes by its own. Those under a grammar, with None, keep
    all."""
    output = SchedulerOutput.make_empty()
    drafts = [[-1] * n or None for n, _, _ in requests]
    others = [other for _, other, _ in requests]
    vars(output).update(vars(output_of(drafts, others)))
    before = deepcopy(output)
    speculator: Any = SimpleNamespace(
        _req_states=SimpleNamespace(
            req_id_to_index={f"r{i}": i for i in range(len(requests))}
        ),
        _num_made=np.array([made or 0 for _, _, made in requests]),
        _constrained={f"r{i}" for i, (_, _, n) in enumerate(requests) if n is None},
        num_speculative_steps=5,
    )
    left = RaggedSpeculator.with_drafts_made(speculator, output)
    kept = [
        [-1] * (n if made is None else min(n, made)) or None for n, _, made in requests
    ]
    expected = output_of(kept, others)
    assert left.num_scheduled_tokens == expected.num_scheduled_tokens
    assert left.total_num_scheduled_tokens == expected.total_num_scheduled_tokens
    assert left.scheduled_spec_decode_tokens == expected.scheduled_spec_decode_tokens
    assert output == before


@pytest.mark.parametrize("is_async", [False, True])
def test_scheduler_is_chosen_when_it_is_made(
    monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    for name in ("UnpadScheduler", "UnpadAsyncScheduler"):
        monkeypatch.setattr(scheduler, name, lambda name=name, **given: (name, given))
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=is_async)
    )
    name, given = scheduler.make_scheduler(vllm_config=config, block_size=16)
    assert name == ("UnpadAsyncScheduler" if is_async else "UnpadScheduler")
    assert given == {"vllm_config": config, "block_size": 16}


def step_of(*req_ids: str) -> ScheduledStep:
    numbers = np.ones(len(req_ids), np.int64)
    flags = np.ones(len(req_ids), bool)
    return ScheduledStep(list(req_ids), numbers, 0 * numbers, flags, flags)


def test_a_request_that_ended_is_not_taken_for_another_of_its_name() -> None:
    first = PendingStep(step_of("a", "b"), np.array([1, 2]))
    second = PendingStep(step_of("b", "a"), np.array([2, 1]))
    second.forget(1)  # once the first is settled
    assert first.is_wanted.tolist() == [True, True]
    assert second.is_wanted.tolist() == [True, False]
