"""Runs all methods on the same batches, in turns, so that whatever else the machine
does falls on all alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vllm_emssd.bench.engine_process import EngineOptions, EngineProcess
from vllm_emssd.bench.kv_price import Forward, decode_forwards, stretched
from vllm_emssd.bench.methods import Method
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import Round

PAUSE_S = 0.3  # until an idle engine's OpenMP threads stop spinning (200 ms)

Rounds = dict[int, dict[str, list[Round]]]  # batch size -> method -> rounds


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. A round of a batch size is at least `min_requests` requests, in
    batches one after the other."""

    methods: Sequence[Method]
    batches: Sequence[int]
    rounds: int
    min_requests: int = 1
    warm_up: int = 1  # rounds of each batch size that are not kept
    priced: Sequence[str] = ()  # methods that also run with stretched contexts

    def num_requests(self, batch: int) -> int:
        """Of one round: whole batches."""
        return batch * max(1, -(-self.min_requests // batch))

    def most_requests(self) -> int:
        return max(self.num_requests(batch) for batch in self.batches)


def in_batches(requests: Sequence[Request], size: int) -> list[list[Request]]:
    return [list(requests[i : i + size]) for i in range(0, len(requests), size)]


@dataclass(slots=True)
class Measurement:
    rounds: Rounds = field(default_factory=dict)
    # batch size -> method -> decoding steps over short and long contexts
    forwards: dict[int, dict[str, list[Forward]]] = field(default_factory=dict)


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
    with progress_bars() as progress, contextlib.ExitStack() as stack:
        engines = _start(plan.methods, options, progress, stack)
        num_turns = len(plan.batches) * (plan.rounds + plan.warm_up)
        bar = progress.add_task("rounds", total=num_turns)
        for batch in plan.batches:
            progress.update(bar, description=f"batch {batch}")
            chosen = requests[: plan.num_requests(batch)]
            batches = in_batches(chosen, batch)
            measured.rounds[batch] = _rounds(
                plan, engines, batches, lambda: progress.advance(bar)
            )
            measured.forwards[batch] = {
                engine.method.name: _stretched(engine, batches[0], options)
                for engine in engines
                if engine.method.name in plan.priced
            }
    return measured


def _rounds(
    plan: Plan,
    engines: Sequence[EngineProcess],
    batches: list[list[Request]],
    advance: Callable[[], None],
) -> dict[str, list[Round]]:
    """The methods in turns, every other time backwards."""
    rounds: dict[str, list[Round]] = {method.name: [] for method in plan.methods}
    for i in range(plan.rounds + plan.warm_up):
        for engine in engines if i % 2 else reversed(engines):
            done = engine.run(batches)
            if i >= plan.warm_up:
                rounds[engine.method.name].append(done)
            time.sleep(PAUSE_S)
        advance()
    return rounds


def _stretched(
    engine: EngineProcess, batch: list[Request], options: EngineOptions
) -> list[Forward]:
    forwards: list[Forward] = []
    for requests in stretched(batch, options.max_model_len):
        lens = [len(request.prompt_token_ids) for request in requests]
        forwards += decode_forwards(engine.run([requests]), lens)
    return forwards


def _start(
    methods: Sequence[Method],
    options: EngineOptions,
    progress: Progress,
    stack: contextlib.ExitStack,
) -> list[EngineProcess]:
    """One after the other: starting engines keep all cores busy."""
    bar = progress.add_task("engines", total=len(methods))
    engines = []
    for method in methods:
        progress.update(bar, description=f"start {method.name}")
        engines.append(stack.enter_context(_running(method, options)))
        progress.advance(bar)
    progress.update(bar, description="engines")
    return engines


@contextlib.contextmanager
def _running(method: Method, options: EngineOptions) -> Iterator[EngineProcess]:
    engine = EngineProcess(method, options)
    try:
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
