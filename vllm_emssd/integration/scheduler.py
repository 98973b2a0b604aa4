"""vLLM's schedulers without placeholder drafts for requests that have none.

Stock gives a request with one token left to compute (after a prefix-cache hit or a
preemption) K placeholder drafts of -1, so that CUDA graphs are uniform. They cost rows,
count as drafts and, on the CPU, reach random sampling. With async scheduling the drafts
of all other requests are -1 too, as they are scheduled before they are made; those
stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class UnpadScheduler(Scheduler):
    def add_request(self, request: Request) -> None:
        # No answer is longer than the model's context, and model runners keep the limit
        # in integers of fixed width, which a larger one would overflow.
        params = request.sampling_params
        if params is not None:
            request.max_tokens = min(request.max_tokens, self.max_model_len)
            params.max_tokens = request.max_tokens
        super().add_request(request)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        drop_placeholder_drafts(
            scheduler_output, self._without_drafts(scheduler_output)
        )
        super()._update_after_schedule(scheduler_output)

    def _without_drafts(self, scheduler_output: SchedulerOutput) -> set[str] | None:
        """Requests whose drafts of -1 are placeholders; None: all."""
        return None


class UnpadAsyncScheduler(UnpadScheduler, AsyncScheduler):
    """For vLLM's V2 runner, where resumed requests are scheduled as new ones."""

    def _without_drafts(self, scheduler_output: SchedulerOutput) -> set[str] | None:
        return {request.req_id for request in scheduler_output.scheduled_new_reqs}


def make_scheduler(*args: Any, vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """What vLLM takes for a scheduler class; whether scheduling is asynchronous is
    settled only after the class is named."""
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler_class = UnpadAsyncScheduler if is_async else UnpadScheduler
    return scheduler_class(*args, vllm_config=vllm_config, **kwargs)


def drop_placeholder_drafts(
    scheduler_output: SchedulerOutput, req_ids: Collection[str] | None = None
) -> None:
    """Unschedule drafts of -1, in place, of all requests or of some. They are all or
    none of a request's."""
    drafts = scheduler_output.scheduled_spec_decode_tokens
    padded = [
        req_id
        for req_id, tokens in drafts.items()
        if tokens and tokens[0] == -1 and (req_ids is None or req_id in req_ids)
    ]
    for req_id in padded:
        num_placeholders = len(drafts.pop(req_id))
        scheduler_output.num_scheduled_tokens[req_id] -= num_placeholders
        scheduler_output.total_num_scheduled_tokens -= num_placeholders


def with_drafts_made(
    scheduler_output: SchedulerOutput, num_made: Mapping[str, int]
) -> SchedulerOutput:
    """What is scheduled, less the drafts that were not made. A copy: the scheduler
    keeps its own, and takes what is left out for rejected.

    `num_made`: drafts of requests; of those left out all are kept.
    """
    drafts = dict(scheduler_output.scheduled_spec_decode_tokens)
    num_scheduled = dict(scheduler_output.num_scheduled_tokens)
    num_cut = 0
    for req_id, made in num_made.items():
        if made < len(drafts.get(req_id, ())):
            num_fewer = len(drafts[req_id]) - made
            num_scheduled[req_id] -= num_fewer
            num_cut += num_fewer
            drafts[req_id] = drafts[req_id][:made]
            if made == 0:
                del drafts[req_id]
    if not num_cut:
        return scheduler_output
    return replace(
        scheduler_output,
        scheduled_spec_decode_tokens=drafts,
        num_scheduled_tokens=num_scheduled,
        total_num_scheduled_tokens=(
            scheduler_output.total_num_scheduled_tokens - num_cut
        ),
    )
