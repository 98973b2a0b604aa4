"""The order in which methods run, with engines that only take notes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from vllm_emssd.bench import harness
from vllm_emssd.bench.engine_process import (
    GPU_SHARE,
    EngineOptions,
    _Engine,
    same_graphs,
    shared_gpu,
)
from vllm_emssd.bench.harness import Plan, measure, stagger_ends
from vllm_emssd.bench.methods import Method, in_one_engine
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import RequestStep, Round
from vllm_emssd.bench.step_profiler import StepProfiler

METHODS = [Method("plain", None), Method("other", {})]
OPTIONS = EngineOptions({"model": "model"})


def requests(*max_tokens: int) -> list[Request]:
    return [Request([1], n, {}) for n in max_tokens]


class NotedEngine:
    """Takes the place of an engine process."""

    made: list[NotedEngine]
    starts: list[str]  # what began to start, and what was waited for
    rounds: list[tuple[Any, ...]]  # setting, sizes of batches, at once, continuous

    def __init__(self, method: Method, options: EngineOptions) -> None:
        self.method, self.num_runs, self.is_closed = method, 0, False
        NotedEngine.starts.append(f"start {method.name}")
        NotedEngine.made.append(self)
        self.is_ready = False

    def wait_until_ready(self) -> None:
        if not self.is_ready:
            NotedEngine.starts.append(f"wait for {self.method.name}")
        self.is_ready = True

    def run(
        self,
        batches: list[list[Request]],
        max_concurrency: int,
        is_continuous: bool,
        setting: Any,
    ) -> Round:
        sizes = [len(batch) for batch in batches]
        NotedEngine.rounds.append((setting, sizes, max_concurrency, is_continuous))
        self.num_runs += 1
        return Round()

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    NotedEngine.made, NotedEngine.starts, NotedEngine.rounds = [], [], []
    monkeypatch.setattr(harness, "EngineProcess", NotedEngine)
    monkeypatch.setattr(harness, "PAUSE_S", 0.0)


def test_engines_start_anew_and_all_their_rounds_are_kept() -> None:
    plan = Plan(METHODS, batches=[1, 2], rounds=2, starts=3)
    kept: list[tuple[int, int]] = []

    def keep(batch: int, rounds: dict[str, list[Round]]) -> None:
        kept.append((batch, len(rounds["other"])))

    rounds = measure(plan, OPTIONS, requests(4, 4), keep)
    assert kept == [(1, 3 * 2), (2, 3 * 2)]
    assert [e.method.name for e in NotedEngine.made] == ["plain", "other"] * 3
    assert all(engine.is_closed for engine in NotedEngine.made)
    assert rounds.keys() == {1, 2}
    assert {len(r) for by in rounds.values() for r in by.values()} == {3 * 2}
    per_engine = 2 * (plan.rounds + plan.warm_up)
    assert {engine.num_runs for engine in NotedEngine.made} == {per_engine}


def test_engines_start_one_by_one_or_together() -> None:
    plan = Plan(METHODS, [1], 1)
    start_plain, start_other = "start plain", "start other"
    wait_plain, wait_other = "wait for plain", "wait for other"
    measure(plan, OPTIONS, requests(4))
    assert NotedEngine.starts == [start_plain, wait_plain, start_other, wait_other]
    NotedEngine.starts.clear()
    measure(replace(plan, starts_together=True), OPTIONS, requests(4))
    assert NotedEngine.starts == [start_plain, start_other, wait_plain, wait_other]


def test_an_engine_that_measures_costs_starts_alone() -> None:
    auto = Method("auto", {"method": "emssd", "draft_length": "auto"})
    plan = Plan([*METHODS, auto, Method("last", None)], [1], 1, starts_together=True)
    measure(plan, OPTIONS, requests(4))
    assert NotedEngine.starts == [
        "start plain",
        "start other",
        "wait for plain",
        "wait for other",
        "start auto",
        "wait for auto",
        "start last",
        "wait for last",
    ]


def test_methods_take_turns_in_one_engine() -> None:
    host, methods = in_one_engine([Method(n, {}) for n in ("k0", "auto", "k3")])
    plan = Plan(methods, [2], rounds=1, starts=2, host=host)
    rounds = measure(plan, OPTIONS, requests(4, 4))
    assert [e.method.name for e in NotedEngine.made] == ["auto", "auto"]
    # The round that warms up goes backwards.
    asked = [method.setting for method in methods]
    assert [r[0] for r in NotedEngine.rounds] == [*reversed(asked), *asked] * 2
    assert {n: len(r) for n, r in rounds[2].items()} == {"k0": 2, "auto": 2, "k3": 2}


@pytest.mark.parametrize(("is_continuous", "sizes"), [(False, [2, 2]), (True, [6])])
def test_batches_one_after_the_other_or_all_requests_at_once(
    is_continuous: bool, sizes: list[int]
) -> None:
    plan = Plan(METHODS, [2], 1, num_prompts=3, is_continuous=is_continuous)
    rounds = measure(plan, OPTIONS, requests(4, 4, 4, 4, 4, 4))
    assert NotedEngine.rounds == [(None, sizes, 2, is_continuous)] * 4
    cut = {0, 1} if is_continuous else set()
    assert [done.unfinished for done in rounds[2]["plain"]] == [cut]


def test_requests_that_start_together_end_one_after_the_other() -> None:
    begun = stagger_ends(requests(8, 8, 3, 1, 8, 8), 4)
    assert [request.max_tokens for request in begun] == [2, 4, 2, 1, 8, 8]


def test_whole_batches() -> None:
    plan = Plan(METHODS, [1, 4, 24], rounds=3, num_prompts={1: 6, 4: 6, 24: 6})
    assert [plan.num_requests(batch) for batch in plan.batches] == [6, 8, 24]
    assert plan.max_requests() == 24


@pytest.mark.parametrize("num_engines", [1, 4])
def test_engines_share_a_gpu(monkeypatch: pytest.MonkeyPatch, num_engines: int) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert shared_gpu(num_engines) == {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    share = shared_gpu(num_engines)["gpu_memory_utilization"]
    assert share * num_engines == pytest.approx(GPU_SHARE)


def test_engines_record_the_same_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [
        Method("plain", None),
        Method("stock", {"method": "draft_model", "num_speculative_tokens": 5}),
        Method("stock-k3", {"method": "draft_model", "num_speculative_tokens": 3}),
        Method("llma", {"method": "emssd", "copy_length": 7}),
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert same_graphs(methods, 128) == {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    sizes = same_graphs(methods, 128)["cudagraph_capture_sizes"]
    assert sizes == sorted(set(sizes))
    assert {128, 4 * 128, 6 * 128, 8 * 128} <= set(sizes)


def test_steps_of_requests_of_an_earlier_round_are_not_recorded() -> None:
    """Scheduled asynchronously, a step of the last round comes with the next."""
    scheduler = SimpleNamespace(update_from_output=lambda scheduled, output: "updated")
    runner = SimpleNamespace(model=nn.Identity())
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    executor = SimpleNamespace(driver_worker=worker)
    engine = SimpleNamespace(engine_core=core, model_executor=executor)
    profiler = StepProfiler(SimpleNamespace(llm_engine=engine))
    profiler.add("old")
    done = profiler.start_round()
    profiler.add("new")
    scheduled = SimpleNamespace(
        num_scheduled_tokens={"old": 3, "new": 2},
        scheduled_spec_decode_tokens={"old": [-1, -1], "new": [5]},
    )
    output = SimpleNamespace(
        sampled_token_ids=[[7], [5, 6]], req_id_to_index={"old": 0, "new": 1}
    )
    assert scheduler.update_from_output(scheduled, output) == "updated"
    assert done.steps == [[RequestStep(0, 2, 1, 2)]]


class CountingEngine:
    """Stands for vLLM's: every step gives each request a token."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}  # request -> tokens to come
        self.total: dict[str, int] = {}
        self.aborted: list[str] = []
        self.concurrency: list[int] = []

    def step(self) -> list[Any]:
        self.concurrency.append(len(self.left))
        self.left = {request: n - 1 for request, n in self.left.items()}
        outputs = [
            SimpleNamespace(
                request_id=request,
                finished=n == 0,
                outputs=[SimpleNamespace(token_ids=[0] * (self.total[request] - n))],
            )
            for request, n in self.left.items()
        ]
        self.left = {request: n for request, n in self.left.items() if n}
        return outputs

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids


@pytest.mark.parametrize(
    ("most", "is_continuous", "seen", "num_tokens", "num_aborted"),
    [
        (2, False, [2, 2, 2, 2, 1, 1], 10, 0),
        (4, False, [4, 3, 2, 1], 10, 0),
        (1, False, [1] * 10, 10, 0),
        (2, True, [2, 2], 4, 2),  # the last starts when the second has ended
        (1, True, [1] * 6, 6, 1),
        (4, True, [], 0, 4),
    ],
)
def test_a_request_takes_the_place_of_the_first_that_ends(
    most: int, is_continuous: bool, seen: list[int], num_tokens: int, num_aborted: int
) -> None:
    counting = CountingEngine()

    class Fed(_Engine):
        def __init__(self) -> None:
            self._llm = SimpleNamespace(llm_engine=counting)

        def _add(self, request: Request) -> str:
            name = str(len(counting.total))
            counting.left[name] = counting.total[name] = request.max_tokens
            return name

    done, unfinished = Fed()._run_batch(requests(1, 2, 3, 4), most, is_continuous)
    assert sum(map(len, done)) == num_tokens
    assert counting.concurrency == seen
    assert len(counting.aborted) == len(unfinished) == num_aborted
    assert all(len(done[i]) < i + 1 for i in unfinished)
