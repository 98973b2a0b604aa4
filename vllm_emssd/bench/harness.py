"""Runs all methods on the same batches, in turns, so that whatever else the machine
does falls on all alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vllm_emssd.bench.engine_process import EngineOptions, EngineProcess
from vllm_emssd.bench.kv_price import Forward, decode_forwards, stretched
from vllm_emssd.bench.methods import Method, Setting, host_of, setting_of
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import Round

PAUSE_S = 0.3  # until an idle engine's OpenMP threads stop spinning (200 ms)

T = TypeVar("T")  # what a method gives for a round, or is run by
Rounds = dict[int, dict[str, list[Round]]]  # batch size -> method -> rounds


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. A round of a batch size is at least `min_requests` requests, in
    batches one after the other."""

    methods: Sequence[Method]
    batches: Sequence[int]
    rounds: int
    min_requests: int = 1
    warm_up: int = 1  # rounds of each batch size that are not kept, after each start
    starts: int = 1  # of all engines: one process may be slow for as long as it lives
    is_continuous: bool = False  # a request takes the place of the first that ends
    starts_together: bool = False  # what starts keeps several cores busy
    in_one_engine: bool = False  # see `methods.host_of`
    priced: Sequence[str] = ()  # methods that also run with stretched contexts

    def num_requests(self, batch: int) -> int:
        """Of one round: whole batches. A continuous one ends when none is left to
        start, so it has one more."""
        num_batches = max(1, -(-self.min_requests // batch)) + self.is_continuous
        return batch * num_batches

    def engines(self) -> Sequence[Method]:
        """The methods that have an engine."""
        host = host_of(self.methods) if self.in_one_engine else None
        return self.methods if host is None else [host]

    def hosts(
        self, engines: Sequence[EngineProcess]
    ) -> Iterator[tuple[Method, EngineProcess]]:
        """Each method, and the engine that runs it."""
        one = [*engines] * len(self.methods) if self.in_one_engine else engines
        return zip(self.methods, one, strict=True)

    def setting(self, method: Method) -> Setting | None:
        """What its engine is told before its turn, if anything."""
        host = host_of(self.methods) if self.in_one_engine else None
        return None if host is None else setting_of(method, host)

    def num_turns(self) -> int:
        """Of all batch sizes: rounds of every method."""
        return self.starts * len(self.batches) * (self.rounds + self.warm_up)

    def most_requests(self) -> int:
        return max(self.num_requests(batch) for batch in self.batches)


def in_batches(requests: Sequence[Request], size: int) -> list[list[Request]]:
    return [list(requests[i : i + size]) for i in range(0, len(requests), size)]


@dataclass(slots=True)
class Measurement:
    rounds: Rounds = field(default_factory=dict)
    # batch size -> method -> decoding steps over short and long contexts
    forwards: dict[int, dict[str, list[Forward]]] = field(default_factory=dict)

    def add(self, other: Measurement) -> None:
        """The same batch sizes and methods, measured again."""
        _add(self.rounds, other.rounds)
        _add(self.forwards, other.forwards)

    def as_dict(self) -> dict[int, dict[str, list[dict[str, Any]]]]:
        """Every round: by batch size, then by method."""
        return {
            batch: {
                name: [r.as_dict() for r in done] for name, done in by_method.items()
            }
            for batch, by_method in self.rounds.items()
        }

    def last_costs(self) -> dict[str, Any]:
        """What forwards cost by the engine's own tables in the end; empty where no
        method has automatic lengths."""
        found: dict[str, Any] = {}
        for by_method in self.rounds.values():
            for done in by_method.values():
                for one in done:
                    found = one.emssd_costs or found
        return found


def _add(
    known: dict[int, dict[str, list[T]]], more: dict[int, dict[str, list[T]]]
) -> None:
    for batch, by_method in more.items():
        of_batch = known.setdefault(batch, {})
        for name, found in by_method.items():
            of_batch.setdefault(name, []).extend(found)


def measure(
    plan: Plan, options: EngineOptions, requests: Sequence[Request]
) -> Measurement:
    """Raises ValueError where there are too few requests."""
    if len(requests) < plan.most_requests():
        raise ValueError(
            f"the workload has {len(requests)} requests, {plan.most_requests()} are "
            "needed: lower --batches or --min-requests, or give a larger workload"
        )
    measured = Measurement()
    with progress_bars() as progress:
        bar = progress.add_task("rounds", total=plan.num_turns())
        for _ in range(plan.starts):
            measured.add(_measure_once(plan, options, requests, progress, bar))
    return measured


def _measure_once(
    plan: Plan,
    options: EngineOptions,
    requests: Sequence[Request],
    progress: Progress,
    bar: TaskID,
) -> Measurement:
    """From the start of all engines to their end."""
    measured = Measurement()
    with contextlib.ExitStack() as stack:
        engines = start_each(
            "engines",
            plan.engines(),
            lambda method: _running(method, options, plan.starts_together),
            progress,
            stack,
        )
        if plan.starts_together:
            for engine in engines:
                engine.wait_until_ready()
        for batch in plan.batches:
            progress.update(bar, description=f"batch {batch}")
            chosen = requests[: plan.num_requests(batch)]
            size = len(chosen) if plan.is_continuous else batch
            batches = in_batches(chosen, size)
            how = (batches, batch, plan.is_continuous)
            runs = [
                (method, partial(engine.run, *how, plan.setting(method)))
                for method, engine in plan.hosts(engines)
            ]
            measured.rounds[batch] = in_turns(plan, runs, lambda: progress.advance(bar))
            measured.forwards[batch] = {
                engine.method.name: _stretched(engine, batches[0], options)
                for engine in engines
                if engine.method.name in plan.priced
            }
    return measured


def in_turns(
    plan: Plan,
    runs: Sequence[tuple[Method, Callable[[], T]]],
    advance: Callable[[], None],
) -> dict[str, list[T]]:
    """The kept rounds by method. Every other time the methods go backwards."""
    rounds: dict[str, list[T]] = {method.name: [] for method, _ in runs}
    for i in range(plan.rounds + plan.warm_up):
        for method, run in runs if i % 2 else reversed(runs):
            done = run()
            if i >= plan.warm_up:
                rounds[method.name].append(done)
            time.sleep(PAUSE_S)
        advance()
    return rounds


def _stretched(
    engine: EngineProcess, batch: list[Request], options: EngineOptions
) -> list[Forward]:
    forwards: list[Forward] = []
    for requests in stretched(batch, options.max_model_len):
        lens = [len(request.prompt_token_ids) for request in requests]
        forwards += decode_forwards(engine.run([requests], len(requests)), lens)
    return forwards


def start_each(
    what: str,
    methods: Sequence[Method],
    start: Callable[[Method], contextlib.AbstractContextManager[T]],
    progress: Progress,
    stack: contextlib.ExitStack,
) -> list[T]:
    """One after the other, each as soon as `start` is done with the one before."""
    bar = progress.add_task(what, total=len(methods))
    started = []
    for method in methods:
        progress.update(bar, description=f"start {method.name}")
        started.append(stack.enter_context(start(method)))
        progress.advance(bar)
    progress.update(bar, description=what)
    return started


@contextlib.contextmanager
def _running(
    method: Method, options: EngineOptions, starts_together: bool
) -> Iterator[EngineProcess]:
    engine = EngineProcess(method, options)
    try:
        if not starts_together:
            engine.wait_until_ready()
        yield engine
    finally:
        engine.close()


def progress_bars() -> Progress:
    return Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
