"""The engine without models: vLLM's scheduling, our proposer, and costs for time.

Everything that decides is the code the engine runs: proposer, draft cursor, policies,
counters. Replaced are the models, by a recorded trace, and the clock, by a cost table.
As in the engine a step schedules, computes the target's rows, keeps a prefix of the
drafts, and drafts for the next one; vLLM's own drafter for requests that end in it too.

Where the table says what launching takes, the host and the device have clocks of their
own, and asynchronous scheduling lets the host run ahead by a step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vllm_emssd.draft_length import DraftLengthPolicy
from vllm_emssd.metrics import Counters
from vllm_emssd.simulate.costs import CostFile
from vllm_emssd.simulate.drafters import (
    CopyDrafting,
    ModelDrafting,
    OracleDrafting,
    PaddedDrafting,
)
from vllm_emssd.simulate.reliability import CountedDraftLength
from vllm_emssd.simulate.replay_drafter import DrafterSetting
from vllm_emssd.simulate.request import SimulatedRequest
from vllm_emssd.simulate.threshold import ThresholdLength
from vllm_emssd.simulate.traces import RequestTrace, Trace


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a batch is decoded, with at most `k` drafts a request and step.

    plain: no speculation. fixed, auto: emssd with that `draft_length`. padded: vLLM's
    own `draft_model`. threshold: drafts go on while perfectly calibrated confidence
    is above one. oracle: just the drafts that will be accepted.
    """

    name: Literal["plain", "fixed", "padded", "auto", "threshold", "oracle"]
    k: int = 0
    stop: float = 0.0  # of threshold
    trim: float = 0.0
    copies: bool = False  # the proposer is `llma`

    @property
    def speculates(self) -> bool:
        return self.name != "plain" and self.k > 0

    def __str__(self) -> str:
        has_length = self.name in ("fixed", "padded")
        return f"{self.name} {self.k}" if has_length else self.name


@dataclass(frozen=True, slots=True)
class Setting:
    """The engine's limits."""

    max_num_seqs: int
    max_num_batched_tokens: int = 4096  # vLLM's default for LLM() on a CPU
    cached_block: int = 0  # tokens: prompts are cached by whole blocks of it; 0: not
    async_scheduling: bool = False


@dataclass(slots=True)
class Outcome:
    """What simulated steps did. Tokens sampled beyond an output's end do not count."""

    ms: float = 0.0
    draft_ms: float = 0.0  # of it, draft forwards
    policy_ms: float = field(default=0.0, compare=False)  # not simulated, but taken
    reliability: np.ndarray | None = field(default=None, compare=False)
    num_tokens: int = 0
    counters: Counters = field(default_factory=Counters)

    def reset(self) -> None:
        """Count from zero again, but for the reliability."""
        self.ms = self.draft_ms = self.policy_ms = 0.0
        self.num_tokens = 0
        self.counters.reset()

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.ms * 1e3 if self.ms else 0.0

    @property
    def policy_ms_per_step(self) -> float:
        return self.policy_ms / max(self.counters.num_steps, 1)

    @property
    def drafts_per_request_step(self) -> float:
        counters = self.counters
        return counters.num_draft_tokens / max(counters.num_request_steps, 1)

    @property
    def accepted_per_request_step(self) -> float:
        counters = self.counters
        return counters.num_accepted_tokens / max(counters.num_request_steps, 1)


class _Timed:
    """A policy that adds the milliseconds spent in its methods to an outcome."""

    def __init__(self, timed: DraftLengthPolicy, outcome: Outcome) -> None:
        self._timed = timed
        self._outcome = outcome

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._timed, name)
        if not callable(value):
            return value

        def call(*args: Any) -> Any:
            start = time.perf_counter()
            returned = value(*args)
            self._outcome.policy_ms += (time.perf_counter() - start) * 1e3
            return returned

        return call


@dataclass(slots=True)
class _Clocks:
    """The host launches, the device computes. Milliseconds since the start."""

    host: float = 0.0
    device: float = 0.0
    _step_before: float = 0.0  # its end, on the device

    def launch(self, ms: float, host_ms: float) -> None:
        """What takes the device `ms`, and is done when the host has launched it all."""
        self.device = max(self.device, self.host) + ms
        self.host += host_ms
        self.device = max(self.device, self.host)

    def end_step(self, is_async: bool) -> None:
        """The host waits for its tokens; with async scheduling for the last step's."""
        self.host = max(self.host, self._step_before if is_async else self.device)
        self._step_before = self.device


class SimulatedEngine:
    """One engine. `outcome` counts from its start, or from when it was last reset; what
    its policy learns stays."""

    def __init__(
        self, trace: Trace, costs: CostFile, method: Decoding, setting: Setting
    ) -> None:
        check_method(method, trace)
        self.outcome = Outcome()
        self._recorded_beyond = trace.header.k
        self._max_model_len = max(
            len(r.prompt_ids) + len(r.output_ids) for r in trace.requests
        )
        self._costs, self._setting = costs, setting
        self._step_costs = costs.step_costs(setting.max_num_seqs)
        self._clocks, self._launches = _Clocks(), costs.target.launches
        self._drafting: ModelDrafting | CopyDrafting | None = None
        if method.speculates:
            self._drafting = self._make_drafting(method, trace)
        # vLLM leaves room for a row more of each request with a draft model.
        self._draft_slots = int(method.speculates and not method.copies)
        self._requests: dict[str, SimulatedRequest] = {}  # that ever arrived
        self._waiting: deque[SimulatedRequest] = deque()
        self._running: list[SimulatedRequest] = []
        self._ended: list[str] = []  # released in the next step

    def run(
        self,
        requests: Sequence[RequestTrace],
        max_tokens: int,
        is_continuous: bool = False,
    ) -> None:
        """Decode requests that arrive at once, until all have ended.

        Args:
            max_tokens: length of each output, if as many tokens were recorded.
            is_continuous: until none waits to take the place of one that has ended;
                those still running are aborted.
        """
        self._waiting.extend(self._arrive(r, max_tokens) for r in requests)
        while self._waiting or (self._running and not is_continuous):
            self._step()
        self._ended += [request.req_id for request in self._running]
        self._running = []

    def _make_drafting(
        self, method: Decoding, trace: Trace
    ) -> ModelDrafting | CopyDrafting:
        setting, is_auto = self._setting, method.name == "auto"
        if method.copies:
            costs = self._step_costs if is_auto else None
            return CopyDrafting(costs, method.k, method.name == "oracle")
        policy = DraftLengthPolicy()
        if is_auto:
            policy = CountedDraftLength(
                self._step_costs,
                method.k,
                may_trim=True,
                num_accepted=lambda req_id: self._requests[req_id].num_acceptable,
            )
            self.outcome.reliability = policy.reliability
        elif method.name == "threshold":
            policy = ThresholdLength(trace, method.stop, method.trim)
        drafter = DrafterSetting(
            self._step_costs,
            method.k,
            setting.max_num_seqs,
            setting.max_num_batched_tokens,
            self._max_model_len,
            self._costs.draft.launches,
        )
        drafting = {"padded": PaddedDrafting, "oracle": OracleDrafting}
        return drafting.get(method.name, ModelDrafting)(
            _Timed(policy, self.outcome),  # type: ignore[arg-type]
            self.outcome.counters,
            drafter,
            knows_the_end=method.name not in ("fixed", "padded"),
        )

    def _arrive(self, trace: RequestTrace, max_tokens: int) -> SimulatedRequest:
        token_ids = np.zeros(self._max_model_len, dtype=np.int32)
        known = trace.prompt_ids + trace.output_ids
        token_ids[: len(known)] = known
        num_recorded = len(trace.output_ids) - self._recorded_beyond
        num_prompt, block = len(trace.prompt_ids), self._setting.cached_block
        # As in vLLM, the last token of a prompt is always computed.
        num_cached = (num_prompt - 1) // block * block if block else 0
        req_id = f"r{len(self._requests)}"
        self._requests[req_id] = request = SimulatedRequest(
            req_id,
            trace,
            min(max_tokens, num_recorded),
            token_ids,
            num_prompt,
            num_cached,
        )
        return request

    # ------------------------------------------------------------ a step

    def _step(self) -> None:
        if self._drafting is not None:
            self._drafting.release(self._ended)
        num_rows = self._schedule()
        batch = [r for r in self._running if r.num_scheduled]
        self._verify(batch)
        draft = self._drafting.draft(batch) if self._drafting else (0.0, 0.0)
        clocks, before = self._clocks, self._clocks.device
        clocks.host += self._costs.fixed_ms(len(batch), speculates=draft[0] > 0)
        target = self._step_costs.target.at(num_rows), self._launches.at(num_rows)
        clocks.launch(*target)
        clocks.launch(*draft)
        clocks.end_step(self._setting.async_scheduling)
        self.outcome.draft_ms += draft[0]
        self.outcome.ms += clocks.device - before
        self._ended = [r.req_id for r in self._running if r.has_ended]
        self._running = [r for r in self._running if not r.has_ended]

    def _schedule(self) -> int:
        """Running requests first, then waiting ones. Returns the rows used."""
        left, num_rows = self._setting.max_num_batched_tokens, 0
        for request in self._running:
            rows = request.schedule(max(left - self._draft_slots, 0))
            num_rows += rows
            left -= rows + self._draft_slots if rows else 0
        while self._waiting and left > self._draft_slots:
            if len(self._running) == self._setting.max_num_seqs:
                break
            request = self._waiting.popleft()
            rows = request.schedule(left - self._draft_slots)
            num_rows += rows
            left -= rows + self._draft_slots
            self._running.append(request)
            if self._drafting is not None:
                self._drafting.admit(request.req_id, request.num_computed)
        return num_rows

    def _verify(self, batch: Sequence[SimulatedRequest]) -> None:
        """Sample for each request, and count as the runner does."""
        counters = self.outcome.counters
        counters.num_steps += 1
        longest = num_verifying = 0
        for request in batch:
            num_left = request.max_tokens - request.num_output
            num_drafts, num_accepted = len(request.drafts), request.sample()
            if not request.num_sampled:
                continue
            if self._drafting is not None:
                self._drafting.record_verified(request.req_id, num_drafts, num_accepted)
            self.outcome.num_tokens += min(request.num_sampled, num_left)
            num_verifying += request.is_decode
            longest = max(longest, num_drafts)
            counters.num_request_steps += 1
            counters.num_draft_tokens += num_drafts
            counters.num_accepted_tokens += num_accepted
            counters.num_verify_rows += 1 + num_drafts
            counters.num_padded_verify_rows += 1
            counters.num_emitted_tokens += request.num_sampled
        counters.num_padded_verify_rows += num_verifying * longest


def check_method(method: Decoding, trace: Trace) -> None:
    """Raise ValueError where the trace cannot replay the method."""
    if method.speculates and method.k > trace.header.k:
        raise ValueError(
            f"{method} asks for {method.k} drafts, but the trace holds k = "
            f"{trace.header.k}: ask for fewer, or record more"
        )


def simulate(
    trace: Trace,
    costs: CostFile,
    method: Decoding,
    setting: Setting,
    max_tokens: int,
    num_prompts: int,
) -> Outcome:
    """Decode the trace's first requests, `setting.max_num_seqs` of them at once.

    All arrive at once; one starts as soon as another has ended, and it is over when
    none is left to start, as `vllm-emssd bench throughput` times them. A first time
    warms up: it counts for what the policy learns, not for time.

    Args:
        num_prompts: as many, at least, and `setting.max_num_seqs` more; the trace is
            repeated where it has fewer.
    """
    size, num_requests = setting.max_num_seqs, len(trace.requests)
    num_started = (max(1, -(-num_prompts // size)) + 1) * size
    engine = SimulatedEngine(trace, costs, method, setting)
    chosen = [trace.requests[i % num_requests] for i in range(num_started)]
    engine.run(chosen, max_tokens, is_continuous=True)
    engine.outcome.reset()
    engine.run(chosen, max_tokens, is_continuous=True)
    return engine.outcome
