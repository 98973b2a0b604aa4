"""Drafts of -1 that vLLM's schedulers schedule before there are any."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from vllm.v1.core.sched.output import SchedulerOutput


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
    """What is scheduled, less the drafts that were not made.

    `num_made`: drafts of requests; of those left out all are kept. The scheduler, which
    keeps its own, takes what is left out for rejected.
    """
    drafts = scheduler_output.scheduled_spec_decode_tokens
    cut = {
        req_id: tokens[: num_made[req_id]]
        for req_id, tokens in drafts.items()
        if num_made.get(req_id, len(tokens)) < len(tokens)
    }
    if not cut:
        return scheduler_output
    num_scheduled = scheduler_output.num_scheduled_tokens
    num_fewer = {req_id: len(drafts[req_id]) - len(cut[req_id]) for req_id in cut}
    return replace(
        scheduler_output,
        scheduled_spec_decode_tokens={
            req_id: tokens for req_id, tokens in (drafts | cut).items() if tokens
        },
        num_scheduled_tokens={
            req_id: num_tokens - num_fewer.get(req_id, 0)
            for req_id, num_tokens in num_scheduled.items()
        },
        total_num_scheduled_tokens=(
            scheduler_output.total_num_scheduled_tokens - sum(num_fewer.values())
        ),
    )
