"""What the V2 runner's speculators of ours have in common: requests and their drafts.

The V2 runner's tokens are on the device: the host knows how many drafts each request
has, not which, and learns late how many were accepted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_emssd.config import EmssdConfig
from vllm_emssd.integration.failure_policy import FailurePolicy
from vllm_emssd.integration.request_options import RequestLimits
from vllm_emssd.integration.scheduler import cut_drafts
from vllm_emssd.integration.v2.copy_source import CopySource
from vllm_emssd.integration.v2.pending_steps import PendingStep
from vllm_emssd.metrics import Counters
from vllm_emssd.verification import ScheduledStep


class RaggedSpeculator(BaseSpeculator):
    """Owns the counters of one rank, what is pending of its requests, and what finds
    copies for them."""

    has_draft_model = True
    has_head = False  # it is an EAGLE head
    num_speculative_steps: int
    max_num_reqs: int
    _source: CopySource | None

    def _begin(self, vllm_config: VllmConfig, req_states: RequestState) -> None:
        config = EmssdConfig.carried_by(vllm_config.additional_config)
        self.counters = Counters()
        self._failures = FailurePolicy(self.counters, vllm_config.parallel_config)
        # Of the step's drafts, how many of each request under a grammar obey it.
        self.num_grammar_valid: Mapping[str, int] = {}
        self._req_states = req_states
        self._last_made: tuple[list[str], np.ndarray] = [], np.zeros(0, np.int64)
        self._num_made = np.zeros(self.max_num_reqs, np.int64)  # drafts, by slot
        self._constrained: set[str] = set()  # requests under a grammar
        # Admissions are numbered from 1: by slot, 0 once its request has left; and the
        # last one of each request.
        self._admission_ids = np.zeros(self.max_num_reqs, np.int64)
        self._admission_id_of: dict[str, int] = {}
        self._num_admitted = 0
        self._request_limits = RequestLimits()
        self._pending_steps: deque[PendingStep] = deque()  # oldest first
        self._max_copied = min(config.copy_length, self.num_speculative_steps)
        self._source = None
        if config.copies:
            self._source = CopySource(
                vllm_config, req_states, self._admission_ids, self._failures
            )

    def forget_warm_up(self) -> None:
        """What was learned from vLLM's own requests, which do not count."""
        if self._source is not None:
            self._source.forget_warm_up()

    # ------------------------------------------------------------ before a step

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        """A step's new requests (resumed ones too) and block allocations. The runner
        has given them their slots."""
        new_reqs = scheduler_output.scheduled_new_reqs
        self._request_limits.admit(new_reqs)
        for new in new_reqs:
            slot = self._req_states.req_id_to_index[new.req_id]
            self._num_admitted += 1
            self._admission_ids[slot] = self._num_admitted
            self._admission_id_of[new.req_id] = self._num_admitted
            self._num_made[slot] = 0
            params = new.sampling_params
            if params is not None and params.structured_outputs is not None:
                self._constrained.add(new.req_id)
        if self._source is not None:
            most = np.full(len(new_reqs), self._max_copied)
            self._request_limits.apply(most, [new.req_id for new in new_reqs])
            self._source.admit(new_reqs, most)

    def release(self, req_ids: Collection[str]) -> None:
        """Forget finished requests."""
        self.preempt(req_ids)
        for req_id in req_ids:
            admission_id = self._admission_id_of.pop(req_id, 0)
            for pending in self._pending_steps:
                pending.forget(admission_id)
        self._constrained.difference_update(req_ids)
        self._request_limits.release(req_ids)

    def preempt(self, req_ids: Collection[str]) -> None:
        """Forget what requests had beside their text: it will be anew."""
        for req_id in req_ids:
            slot = self._req_states.req_id_to_index.get(req_id)
            if slot is not None:
                self._admission_ids[slot] = 0
                self._vacate(slot)

    def _vacate(self, slot: int) -> None:
        """The slot's request has left."""
        if self._source is not None:
            self._source.copier.release(slot)

    def with_drafts_made(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        """An async scheduler schedules K drafts of every request before there are any.
        Those that were not made cost no rows; but under a grammar they stay, since its
        bit mask has a row for each, and are forbidden. The scheduler keeps its own
        output, and takes what is left out for rejected."""
        req_ids = list(scheduler_output.scheduled_spec_decode_tokens)
        slot_of = self._req_states.req_id_to_index
        slots = np.fromiter(map(slot_of.__getitem__, req_ids), np.int64, len(req_ids))
        num_made = self._num_made[slots]
        fewer = {
            req_ids[i]: int(num_made[i])
            for i in np.flatnonzero(num_made < self.num_speculative_steps)
            if req_ids[i] not in self._constrained
        }
        if not fewer:
            return scheduler_output
        output = replace(
            scheduler_output,
            scheduled_spec_decode_tokens=dict(
                scheduler_output.scheduled_spec_decode_tokens
            ),
            num_scheduled_tokens=dict(scheduler_output.num_scheduled_tokens),
        )
        cut_drafts(output, fewer)
        return output

    # ------------------------------------------------------------ after a step

    def record_acceptance(self, num_sampled: np.ndarray) -> None:
        """Count the oldest step whose acceptance was not recorded. Does nothing where
        there is none.

        `num_sampled`: [num_reqs] tokens sampled by each request of its batch.
        """
        if not self._pending_steps:
            return
        pending = self._pending_steps.popleft()
        num_accepted = np.maximum(num_sampled.astype(np.int64), 1) - 1
        self._settle(pending, num_accepted)
        self._as_verified(pending, num_accepted).count(
            num_sampled,
            self.num_speculative_steps,
            self.counters,
            pending.is_wanted,
            has_draft_model=self.has_draft_model,
            has_head=self.has_head,
        )

    def _settle(self, pending: PendingStep, num_accepted: np.ndarray) -> None:
        """What the step accepted. [num_reqs] int64"""

    def _as_verified(
        self, pending: PendingStep, num_accepted: np.ndarray
    ) -> ScheduledStep:
        """The step with the drafts that were verified: all that were scheduled, unless
        the device left some out."""
        return pending.step

    @property
    def num_decoding(self) -> int:
        """Requests of the last step whose prompts had been computed before it."""
        return int(self._pending_steps[-1].step.is_decode.sum())

    @property
    def draft_lens(self) -> dict[str, int]:
        """Drafts of each request of the last batch."""
        req_ids, num_made = self._last_made
        return dict(zip(req_ids, num_made.tolist(), strict=True))

    def _note_made(
        self, req_ids: list[str], slots: np.ndarray, num_made: np.ndarray
    ) -> None:
        """Drafts that the requests of a batch have. [num_reqs] each"""
        self._last_made = req_ids, num_made
        self._num_made[slots] = num_made
