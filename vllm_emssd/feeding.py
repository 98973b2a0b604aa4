"""What a step feeds to the drafter before it drafts, planned alike on both runners."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vllm_emssd.draft_length.policy import DraftLengthPolicy, StepInfo


def plan_feeding(
    step: StepInfo,
    policy: DraftLengthPolicy,
    may_draft: np.ndarray,
    waits_for_another: Callable[[np.ndarray], np.ndarray],
    max_num_rows: int,
    kept_rows: int = 0,
    prompt_rows: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Missing rows to feed, and drafts to make, of each request. [num_reqs] int64 both

    Args:
        may_draft: [num_reqs] bool, now or, in prefill, once the prompt is computed.
        waits_for_another: of the requests that would feed rows, those that share the
            block they begin in with an earlier one. [num_reqs] bool both
        max_num_rows: most rows of the forward.
        kept_rows: missing rows of a sampling request that its first draft feeds.
        prompt_rows: [num_reqs] integers to feed even of requests that do not draft.
    """
    draft_lens = policy.plan(step)
    feeds = draft_lens > 0
    if policy.feeds_prompts:
        feeds = feeds | (~step.is_sampling & may_draft)
    wanted = np.where(feeds, step.missing_rows, 0)
    if kept_rows:
        wanted = np.maximum(wanted - kept_rows * step.is_sampling, 0)
    if prompt_rows is not None:
        wanted = np.maximum(wanted, prompt_rows)
    if not wanted.any():
        return wanted, draft_lens
    # A block shared by several requests is written by one; the others wait a step.
    waits = waits_for_another(wanted > 0)
    granted = grant_rows(np.where(waits, 0, wanted), max_num_rows)
    # Requests that lack more than fits draft once they have been fed all of it.
    return granted, np.where(granted < wanted, 0, draft_lens)


def grant_rows(wanted: np.ndarray, budget: int) -> np.ndarray:
    """Share `budget` rows so that the most requests get all they want: the smallest
    wishes come first (ties: the lower index), the first that does not fit gets what is
    left, later ones nothing. Shapes: [num_reqs] int64."""
    order = np.argsort(wanted, kind="stable")
    before = np.cumsum(wanted[order]) - wanted[order]
    granted: np.ndarray = np.empty_like(wanted)
    granted[order] = np.clip(budget - before, 0, wanted[order])
    return granted
