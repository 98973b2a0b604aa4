"""Measures what a step costs: at the start with dummy rows, then from live steps.

With several workers all measure, since they run the forwards together, but only the
first one's costs count. The others take them over at the start and every so many steps,
so that all workers decide from the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_emssd.draft_length import CostTable, StepCosts
from vllm_emssd.integration.forward_clock import TimedByClock
from vllm_emssd.integration.ranks import Ranks

logger = init_logger("vllm.emssd.step_costs")

TIMED_ROWS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256)
_ROWS_OF_GPUS = (*TIMED_ROWS, 384, 512, 768, 1024, 1536, 2048)  # as far as graphs go
_PASSES = 4  # over the row counts; the first is warm-up
_MANY_ROWS, _PASSES_OF_MANY = 64, 3  # more rows than that: their times vary less
CONTEXT = 256  # tokens each row attends to
# What a step costs besides its forwards (scheduling, sampling, Python), until one of
# its kind was seen: low, so that each kind is tried where it may gain little.
FIXED_MS = 0.25
_REQUESTS_AS_A_STEP = 32  # this many requests are thought to add as much to that again
_NUM_REQS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FIRST_STEPS = 5  # of a kind: the quickest replaces the guess
_RATE = 0.05  # weight of a forward in what its confidences cost more
_IDLE_STEPS = 4  # from one that is learned from to the next
_STEPS_BETWEEN_SHARING = 64  # of the first worker's costs
# Steps: without drafts, that verify some but make none, and how those made stop.
PLAIN, COPYING, BY_DEPTH, BY_CONFIDENCE = range(4)
_BESIDES = ("fixed_ms", "copying_ms", "speculation_ms", "deciding_ms", "confidence_ms")
_SHARED = ("target", "draft", *_BESIDES)


class StepCostMeter:
    """Owns the costs of one worker and keeps them fresh.

    `costs` are those to decide by, the same on all ranks; `measured` are this worker's
    own. A single worker has one object for both.

    Args:
        measured: costs at the start.
        target, drafter: their live forwards; no drafter where none is used.
    """

    def __init__(
        self,
        measured: StepCosts,
        target: TimedByClock,
        drafter: TimedByClock | None,
        ranks: Ranks,
    ) -> None:
        self._target = target
        self._drafter = drafter
        self._ranks = ranks
        self._num_steps = 0
        self._step_ended: float | None = None
        # By kind of step: what it takes besides its forwards, by its requests.
        guess = measured.fixed_ms * (1 + np.array(_NUM_REQS) / _REQUESTS_AS_A_STEP)
        more = 0.0, 0.0, measured.speculation_ms, measured.speculation_ms
        self._rest_ms = [CostTable(_NUM_REQS, guess + ms) for ms in more]
        # Of the first steps of each kind: times, over what they were thought to take.
        self._first: list[list[float]] = [[] for _ in more]
        self._known_to_target = {rows for rows, _ in measured.target.points}
        self._known_to_draft = {rows for rows, _ in measured.draft.points}
        self.measured = measured
        self.costs = measured if ranks.is_alone else copy(measured)
        self._take_over_costs()
        logger.info(
            "Measured costs in ms, those of forwards as (rows, ms): %s", self.as_dict()
        )

    def step_done(
        self, num_reqs: int, learns_costs: bool = True, verifies: bool = False
    ) -> None:
        """Called when a step's drafts are made: learn from the step, which verified
        drafts or none. Without `learns_costs` only what it costs besides its forwards,
        and that of one step in four once it is known: idle steps must take no time.

        Args:
            num_reqs: of the step. 0 of prompts alone: they say nothing of other steps.
        """
        now = time.perf_counter()
        costs, drafter = self.measured, self._drafter
        target = self._target.take_timings()
        draft = [] if drafter is None else drafter.take_timings()
        returns_confidence = drafter is not None and drafter.returns_confidence
        if learns_costs:
            _learn(costs.target, target, self._known_to_target)
            if draft:
                self._learn_draft(
                    draft[self._num_steps % len(draft)], returns_confidence
                )
        kind = COPYING if verifies else PLAIN
        if draft:
            kind = BY_CONFIDENCE if returns_confidence else BY_DEPTH
        is_due = learns_costs or self._num_steps % _IDLE_STEPS == 0
        is_due |= len(self._first[kind]) < _FIRST_STEPS
        # Times of a GPU may come a step late: then none is of this step, or two are.
        is_due &= num_reqs > 0 and len(target) == 1
        if is_due and self._step_ended is not None:
            forwards_ms = sum(ms for _, ms in (*target, *draft))
            ms = (now - self._step_ended) * 1e3 - forwards_ms
            self._learn_rest(ms, num_reqs, kind)
        self._step_ended = now
        self._num_steps += 1
        if self._num_steps % _STEPS_BETWEEN_SHARING == 0:
            self._take_over_costs()

    def _learn_draft(self, timing: tuple[int, float], returns_confidence: bool) -> None:
        """From one forward of a step: all of them would take 0.2 ms."""
        costs = self.measured
        if not returns_confidence:
            _learn(costs.draft, [timing], self._known_to_draft)
            return
        rows, ms = timing
        bare = costs.draft.at(rows)
        more = min(max(ms - bare, 0.0), bare)
        costs.confidence_ms += _RATE * (more - costs.confidence_ms)

    def _learn_rest(self, ms: float, num_reqs: int, kind: int) -> None:
        """A step of that kind took `ms` besides its forwards."""
        learned, first = self._rest_ms[kind], self._first[kind]
        if len(first) < _FIRST_STEPS:
            first.append(ms / learned.at(num_reqs))
            if len(first) == _FIRST_STEPS:  # the guess may be far too low
                scaled = max(min(first), 1.0) * np.array(learned.points)[:, 1]
                self._rest_ms[kind] = CostTable(_NUM_REQS, scaled)
        else:
            # A GPU's time may be counted in another step: only what is slow is unusual.
            learned.observe(num_reqs, max(ms, learned.at(num_reqs) / 2))
        plain, copying, by_depth, by_confidence = (
            table.at(num_reqs) for table in self._rest_ms
        )
        if self._first[BY_DEPTH]:
            drafting = by_depth
        elif self._first[BY_CONFIDENCE]:
            drafting = by_confidence
        else:
            drafting = max(by_depth, plain)
        costs = self.measured
        # A step without drafts costs no more: it was slower when last seen.
        costs.fixed_ms = min(plain, drafting)
        costs.copying_ms = max(copying - costs.fixed_ms, 0.0)
        costs.speculation_ms = drafting - costs.fixed_ms
        costs.deciding_ms = max(by_confidence - drafting, 0.0)

    def _take_over_costs(self) -> None:
        """The first rank's measured costs are everyone's from now on, and the points
        of its tables: another rank may not yet have read as many of a GPU's times."""
        if self._ranks.is_alone:
            return
        measured = [getattr(self.measured, name) for name in _SHARED]
        for name, cost in zip(_SHARED, self._ranks.of_first(measured), strict=True):
            setattr(self.costs, name, cost)

    def as_dict(self) -> dict[str, Any]:
        """See the worker's `emssd_costs`."""
        return {
            "target": self.costs.target.points,
            "draft": self.costs.draft.points,
            **{name: getattr(self.costs, name) for name in _BESIDES},
        }


def _learn(table: CostTable, timings: list[tuple[int, float]], known: set[int]) -> None:
    """From forwards (rows, ms). The first of a row count may be slow, as kernels are
    made and memory is allocated for it: it counts only if it was quicker than expected.
    The table is extended to all row counts seen."""
    for rows, ms in timings:
        table.cover(rows)
        if rows in known or ms < table.at(rows):
            table.observe(rows, ms)
        known.add(rows)


def time_forwards(
    run: Callable[[int], object],
    timed: TimedByClock,
    max_rows: int,
    device: torch.device,
) -> list[tuple[int, float]]:
    """(rows, ms), each row count several times over. They take turns: if the machine is
    busy for a while, that slows one time of several row counts, not all times of one.

    Args:
        run: a forward with that many rows, each with some context.
    """
    row_counts = TIMED_ROWS if device.type == "cpu" else _ROWS_OF_GPUS
    samples: list[tuple[int, float]] = []
    for number in range(_PASSES):
        for num_rows in (n for n in row_counts if n <= max_rows):
            if num_rows > _MANY_ROWS and number >= _PASSES_OF_MANY:
                continue
            run(num_rows)
            if device.type != "cpu":  # a CPU has computed it by then
                torch.accelerator.synchronize(device)
            timings = timed.take_timings()
            if number:
                samples += [(num_rows, ms) for _, ms in timings]
    return samples
