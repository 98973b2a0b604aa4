"""Who runs what, when: with engines that only take notes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from vllm_emssd.bench import harness
from vllm_emssd.bench.engine_process import EngineOptions, _Engine
from vllm_emssd.bench.harness import Plan, measure
from vllm_emssd.bench.methods import Method, Setting
from vllm_emssd.bench.provenance import COMMIT, commit
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import RequestStep, Round
from vllm_emssd.bench.step_profiler import Stopwatch
from vllm_emssd.commands.bench import GPU_SHARE, add_arguments, plan_of, shared_gpu

ONE_ENGINE = ["--one-engine", "--draft-model", "d", "--methods"]
METHODS = [Method("plain", None), Method("other", {})]
OPTIONS = EngineOptions("model", "tokenizer", max_model_len=64, max_num_seqs=2)


def requests(*max_tokens: int) -> list[Request]:
    return [Request([1], n, {}, 0.0, "") for n in max_tokens]


class NotedEngine:
    """Takes the place of an engine process."""

    made: list[NotedEngine]
    starts: list[str]  # what began to start, and what was waited for

    def __init__(self, method: Method, options: EngineOptions) -> None:
        self.method, self.is_closed = method, False
        NotedEngine.starts.append(f"start {method.name}")
        self.runs: list[tuple[list[int], int, bool]] = []  # of batches, at once, ...
        self.settings: list[Setting | None] = []
        NotedEngine.made.append(self)

    def wait_until_ready(self) -> None:
        NotedEngine.starts.append(f"wait for {self.method.name}")

    def run(
        self,
        batches: list[list[Request]],
        max_concurrency: int,
        is_continuous: bool,
        setting: Setting | None = None,
    ) -> Round:
        sizes = [len(batch) for batch in batches]
        self.runs.append((sizes, max_concurrency, is_continuous))
        self.settings.append(setting)
        return Round()

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    NotedEngine.made, NotedEngine.starts = [], []
    monkeypatch.setattr(harness, "EngineProcess", NotedEngine)
    monkeypatch.setattr(harness, "PAUSE_S", 0.0)


def test_engines_start_anew_and_all_their_rounds_are_kept() -> None:
    plan = Plan(METHODS, batches=[1, 2], rounds=2, starts=3)
    measured = measure(plan, OPTIONS, requests(4, 4))
    assert [e.method.name for e in NotedEngine.made] == ["plain", "other"] * 3
    assert all(engine.is_closed for engine in NotedEngine.made)
    assert {len(r) for by in measured.rounds.values() for r in by.values()} == {3 * 2}
    assert measured.rounds.keys() == measured.forwards.keys() == {1, 2}
    per_engine = 2 * (plan.rounds + plan.warm_up)
    assert {len(engine.runs) for engine in NotedEngine.made} == {per_engine}


def test_engines_start_one_by_one_or_together() -> None:
    plan = Plan(METHODS, [1], 1)
    start_plain, start_other = "start plain", "start other"
    wait_plain, wait_other = "wait for plain", "wait for other"
    measure(plan, OPTIONS, requests(4))
    assert NotedEngine.starts == [start_plain, wait_plain, start_other, wait_other]
    NotedEngine.starts.clear()
    measure(replace(plan, starts_together=True), OPTIONS, requests(4))
    assert NotedEngine.starts == [start_plain, start_other, wait_plain, wait_other]


@pytest.mark.parametrize(
    ("host", "rpc", "arguments"),
    [
        ("auto", "emssd_fix_draft_length", {"k0": 0, "auto": None, "k3": 3}),
        (
            "mixed-auto",
            "emssd_use_proposer",
            {"llma-auto": "llma", "mixed-auto": None, "auto": "draft_model"},
        ),
    ],
)
def test_methods_take_turns_in_one_engine(
    host: str, rpc: str, arguments: dict[str, int | str | None]
) -> None:
    methods = [Method(name, {}) for name in arguments]
    plan = Plan(methods, [2], rounds=1, starts=2, in_one_engine=True)
    measured = measure(plan, OPTIONS, requests(4, 4))
    assert [e.method.name for e in NotedEngine.made] == [host, host]
    # The round that warms up goes backwards.
    asked = [(rpc, argument) for argument in arguments.values()]
    assert NotedEngine.made[0].settings == [*reversed(asked), *asked]
    assert {name: len(r) for name, r in measured.rounds[2].items()} == dict.fromkeys(
        arguments, 2
    )


def test_each_engine_is_left_as_it_is_with_one_for_each_method() -> None:
    measure(Plan(METHODS, [2], rounds=1), OPTIONS, requests(4, 4))
    assert [e.settings for e in NotedEngine.made] == [[None, None]] * 2


@pytest.mark.parametrize("num_engines", [1, 4])
def test_engines_share_a_gpu(monkeypatch: pytest.MonkeyPatch, num_engines: int) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert shared_gpu(num_engines) == {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    share = shared_gpu(num_engines)["gpu_memory_utilization"]
    assert share * num_engines == pytest.approx(GPU_SHARE)


def test_a_copy_of_the_code_says_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMIT, "abc1234")
    assert commit(Path("/")) == "abc1234"
    monkeypatch.delenv(COMMIT)
    assert commit(Path("/")) == ""


def test_steps_of_requests_of_an_earlier_round_are_not_recorded() -> None:
    """Scheduled asynchronously, a step of the last round comes with the next."""
    scheduler = SimpleNamespace(update_from_output=lambda scheduled, output: "updated")
    runner = SimpleNamespace(model=nn.Identity())
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    executor = SimpleNamespace(driver_worker=worker)
    engine = SimpleNamespace(engine_core=core, model_executor=executor)
    stopwatch = Stopwatch(SimpleNamespace(llm_engine=engine))
    stopwatch.request_index["new"] = 0
    scheduled = SimpleNamespace(
        num_scheduled_tokens={"old": 3, "new": 2},
        scheduled_spec_decode_tokens={"old": [-1, -1], "new": [5]},
    )
    output = SimpleNamespace(
        sampled_token_ids=[[7], [5, 6]], req_id_to_index={"old": 0, "new": 1}
    )
    assert scheduler.update_from_output(scheduled, output) == "updated"
    assert stopwatch.round.steps == [[RequestStep(0, 2, 1, 2)]]


@pytest.mark.parametrize(("is_continuous", "sizes"), [(False, [2, 2]), (True, [6])])
def test_batches_one_after_the_other_or_all_requests_at_once(
    is_continuous: bool, sizes: list[int]
) -> None:
    plan = Plan(METHODS, [2], 1, min_requests=3, is_continuous=is_continuous)
    measure(plan, OPTIONS, requests(4, 4, 4, 4, 4, 4))
    wanted = {str((sizes, 2, is_continuous))}
    assert {str(run) for e in NotedEngine.made for run in e.runs} == wanted


class CountingEngine:
    """Stands for vLLM's: every step gives each request a token."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}  # request -> tokens to come
        self.total: dict[str, int] = {}
        self.aborted: list[str] = []
        self.concurrency: list[int] = []

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

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

    done = Fed()._run_batch(requests(1, 2, 3, 4), most, is_continuous)
    assert sum(map(len, done)) == num_tokens
    assert counting.concurrency == seen
    assert len(counting.aborted) == num_aborted


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--http", "--starts", "2"], "leave out --starts"),
        (["--http", "--continuous"], "leave out --starts, --start-together"),
        (["--continuous", "--methods", "llma", "llma-padded"], "runs whole batches"),
        (["--draft-model", "d", "--methods", "plain", "k0"], "needs --one-engine"),
        ([*ONE_ENGINE, "auto", "stock"], "leave out stock"),
        ([*ONE_ENGINE, "k1", "k2"], "add one of them to --methods"),
        ([*ONE_ENGINE, "mixed-auto", "auto", "k2"], "leave out k2"),
        ([*ONE_ENGINE, "auto", "k17"], "no kN above --auto-tokens"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: list[str], says: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ValueError, match=says):
        plan_of(parser.parse_args(["--methods", "plain", *flags]))
