"""vLLM's scheduler without placeholder drafts.

Stock pads a request that has one token left to compute (after a prefix-cache hit or
a preemption) with K placeholder drafts of -1, for the sake of uniform CUDA graphs.
They cost rows, count as drafts and, on the CPU, reach random sampling.
"""

from __future__ import annotations

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler


class UnpadScheduler(Scheduler):
    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        drop_placeholder_drafts(scheduler_output)
        super()._update_after_schedule(scheduler_output)


def drop_placeholder_drafts(scheduler_output: SchedulerOutput) -> None:
    """Unschedule drafts of -1, in place. They are all or none of a request's."""
    drafts = scheduler_output.scheduled_spec_decode_tokens
    padded = [req_id for req_id, tokens in drafts.items() if tokens and tokens[0] == -1]
    for req_id in padded:
        num_placeholders = len(drafts.pop(req_id))
        scheduler_output.num_scheduled_tokens[req_id] -= num_placeholders
        scheduler_output.total_num_scheduled_tokens -= num_placeholders
