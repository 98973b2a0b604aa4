"""Runs all methods on the same requests, in turns, so that other load on the machine
slows all of them alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

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
from vllm_emssd.bench.methods import Method
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import Round

PAUSE_S = 0.3  # until an idle engine's OpenMP threads stop spinning (200 ms)

S = TypeVar("S")  # what runs a method: an engine or a server
T = TypeVar("T")  # what it gives for a round
Results = dict[int, dict[str, list[T]]]  # requests at once -> method -> its rounds
Rounds = Results[Round]
Keep = Callable[[int, dict[str, list[T]]], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. A round at `batch` requests at once is at least `num_prompts`
    requests, those of that batch if there are several, and a multiple of `batch`."""

    methods: Sequence[Method]
    batches: Sequence[int]
    rounds: int
    num_prompts: int | Mapping[int, int] = 1
    warm_up: int = 1  # rounds of each batch size that are not kept, after each start
    starts: int = 1  # of all engines: one process may be slow for as long as it lives
    is_continuous: bool = False  # a request takes the place of the first that ends
    starts_together: bool = False  # but those that measure costs start alone
    host: Method | None = None  # whose engine runs all methods, by their settings

    def num_requests(self, batch: int) -> int:
        """Of one round. A continuous one ends when none is left to start, so it has
        `batch` more."""
        least = self.num_prompts
        least = least if isinstance(least, int) else least[batch]
        return batch * (max(1, -(-least // batch)) + self.is_continuous)

    def max_requests(self) -> int:
        return max(self.num_requests(batch) for batch in self.batches)


def measure(
    plan: Plan,
    options: EngineOptions,
    requests: Sequence[Request],
    keep: Keep[Round] | None = None,
) -> Rounds:
    """One engine for each method, or one for all. See `take_turns`."""

    started: list[EngineProcess] = []

    @contextlib.contextmanager
    def start(method: Method) -> Iterator[EngineProcess]:
        is_alone = not plan.starts_together or method.measures_costs
        if is_alone:
            for other in started:
                other.wait_until_ready()
        engine = EngineProcess(method, options)
        started.append(engine)
        try:
            if is_alone:
                engine.wait_until_ready()
            yield engine
        finally:
            engine.close()

    def run(engine: EngineProcess, method: Method, batch: int) -> Round:
        chosen = requests[: plan.num_requests(batch)]
        if not plan.is_continuous:
            batches = [
                list(chosen[i : i + batch]) for i in range(0, len(chosen), batch)
            ]
            return engine.run(batches, batch, False, method.setting)
        staggered = stagger_ends(chosen, batch)
        done = engine.run([staggered], batch, True, method.setting)
        done.unfinished |= set(range(batch))  # the shortened ones
        return done

    return take_turns(plan, start, run, EngineProcess.wait_until_ready, keep)


def stagger_ends(requests: Sequence[Request], batch: int) -> list[Request]:
    """With the first `batch` shortened, so that they end one after the other, as in a
    server that has run for a while. Else those of plain decoding would end together,
    and the round with them, without the prompts of the next ones."""
    shortened = [
        replace(request, max_tokens=max(request.max_tokens * (i + 1) // batch, 1))
        for i, request in enumerate(requests[:batch])
    ]
    return [*shortened, *requests[batch:]]


def take_turns(
    plan: Plan,
    start: Callable[[Method], contextlib.AbstractContextManager[S]],
    run: Callable[[S, Method, int], T],
    wait: Callable[[S], None] = lambda side: None,
    keep: Keep[T] | None = None,
) -> Results[T]:
    """All sides stay up and run a round each in turn, every other time backwards.

    Args:
        start: one after the other; the side ends with its context.
        run: a round of a method, with so many requests at once.
        wait: until a side that has started can run.
        keep: gets all rounds of a number of requests, as soon as there are no more.
    """
    results: Results[T] = {
        batch: {method.name: [] for method in plan.methods} for batch in plan.batches
    }
    num_rounds = plan.starts * len(plan.batches) * (plan.rounds + plan.warm_up)
    with _progress_bars() as progress:
        bar = progress.add_task("rounds", total=num_rounds)
        for starts_left in reversed(range(plan.starts)):
            with contextlib.ExitStack() as stack:
                started = []
                for method in [plan.host] if plan.host else plan.methods:
                    progress.update(bar, description=f"start {method.name}")
                    started.append(stack.enter_context(start(method)))
                for side in started:
                    wait(side)
                sides = started * (len(plan.methods) // len(started))
                turns = list(zip(sides, plan.methods, strict=True))
                for batch in plan.batches:
                    progress.update(bar, description=f"{batch} at once")
                    for i in range(-plan.warm_up, plan.rounds):
                        for side, method in turns[:: -1 if i % 2 else 1]:
                            done = run(side, method, batch)
                            if i >= 0:
                                results[batch][method.name].append(done)
                            time.sleep(PAUSE_S)
                        progress.advance(bar)
                    if keep is not None and not starts_left:
                        keep(batch, results[batch])
    return results


def _progress_bars() -> Progress:
    return Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
