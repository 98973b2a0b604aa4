"""vLLM's schedulers without placeholder drafts for requests that have none.

Stock gives a request with one token left to compute (after a prefix-cache hit or a
preemption) K placeholder drafts of -1, so that CUDA graphs are uniform. They cost rows,
count as drafts and, on the CPU, reach random sampling. With async scheduling the drafts
of all other requests are -1 too, as they are scheduled before they are made; those
stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class UnpadScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM 0.33 would write -1 over the drafts of steps that cannot use them.
        self.can_skip_drafts = False

    def add_request(self, request: Request) -> None:
        # No answer is longer than the model's context, and model runners keep the limit
        # in integers of fixed width, which a larger one would overflow.
        request.max_tokens = min(request.max_tokens, self.max_model_len)
        request.sampling_params.max_tokens = request.max_tokens
        super().add_request(request)

    def _handle_stopped_request(self, request: Request) -> bool:
        # Of an answer that ends within accepted drafts, more was computed than is in
        # it. A streaming session's next input would go on behind that.
        num_computed = request.num_computed_tokens - request.num_output_placeholders
        num_unwanted = max(num_computed - (request.num_tokens - 1), 0)
        request.num_computed_tokens -= num_unwanted
        return super()._handle_stopped_request(request)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # Requests that were waiting have no drafts but placeholders.
        admitted = {new.req_id for new in scheduler_output.scheduled_new_reqs}
        admitted |= scheduler_output.scheduled_cached_reqs.resumed_req_ids
        padded = admitted & scheduler_output.scheduled_spec_decode_tokens.keys()
        cut_drafts(scheduler_output, dict.fromkeys(padded, 0))
        super()._update_after_schedule(scheduler_output)


class UnpadAsyncScheduler(UnpadScheduler, AsyncScheduler):
    """For vLLM's V2 runner."""


def make_scheduler(*args: Any, vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """What vLLM takes for a scheduler class; whether scheduling is asynchronous is
    settled only after the class is named."""
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler_class = UnpadAsyncScheduler if is_async else UnpadScheduler
    return scheduler_class(*args, vllm_config=vllm_config, **kwargs)


def cut_drafts(scheduler_output: SchedulerOutput, num_kept: Mapping[str, int]) -> None:
    """Unschedule all but the first `num_kept` drafts of these requests, in place."""
    drafts = scheduler_output.scheduled_spec_decode_tokens
    for req_id, num in num_kept.items():
        num_cut = max(len(drafts[req_id]) - num, 0)
        scheduler_output.num_scheduled_tokens[req_id] -= num_cut
        scheduler_output.total_num_scheduled_tokens -= num_cut
        drafts[req_id] = drafts[req_id][:num]
        if num == 0:
            del drafts[req_id]
