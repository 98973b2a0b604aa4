"""The plan of a step: one number of drafts, the *depth*, for all requests that draft.

A draft is worth its cost where more tokens are expected of it than its time brings
otherwise, in the long run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_emssd.draft_length.cost import StepCosts
from vllm_emssd.draft_length.policy import StepInfo

_BACKFILL_STEPS = 32  # over which feeding text that the drafter missed is charged


@dataclass(frozen=True, slots=True)
class Plan:
    """The best depth, and what time is worth then."""

    may_draft: np.ndarray  # [num_reqs] bool: the others copy, or cannot
    depth: int  # 0 if no drafts pay
    gain: float  # by drafts and stopping, as a share of tokens or of what time is worth
    tokens_per_ms: float  # that time is worth
    tokens: np.ndarray  # [K + 1] float64: expected, by depth
    ms: np.ndarray  # [K + 1] float64: of the step without its prompts, by depth
    rows: int  # of the target, drafts aside
    verify_ms: float  # of the target, for a draft
    draft_ms: float  # of the drafter, for a request more in a forward
    forward_ms: float  # of a draft forward, however few requests are in it


def best_plan(
    step: StepInfo,
    acceptance: np.ndarray,
    costs: StepCosts,
    tokens_per_ms: float,
    stopping_gain: float = 0.0,
) -> Plan:
    """The depth of most tokens beyond what its time is worth, 0 included.

    Args:
        acceptance: [K] by depth, K >= 1.
        tokens_per_ms: what time is worth.
        stopping_gain: tokens that a request gains where confidence stops it, not the
            depth; what that costs is taken off.
    """
    target, draft = costs.target, costs.draft
    k = np.arange(len(acceptance) + 1)
    gains = np.zeros(len(k))
    acceptance.cumprod().cumsum(out=gains[1:])
    copies = step.copies
    num_copied = int(copies.rows.sum()) if copies else 0
    tokens = step.num_sampling + (float(copies.gains.sum()) if copies else 0.0)
    # Prompts must be computed whatever the lengths: they move the target along its
    # curve, but a slow step with a prompt in it does not make drafts cheap.
    copying_ms = costs.copying_ms if num_copied else 0.0
    base_ms = costs.fixed_ms + copying_ms + target.at(step.num_sampling + num_copied)
    base_rows = step.base_rows + num_copied
    without_ms = target.at(base_rows)

    may_draft = step.max_draft_tokens > 0
    if copies and num_copied:  # a request that gains more by its copy keeps it
        num_reqs = max(int(np.count_nonzero(may_draft)), 1)
        row_ms = (target.at(base_rows + num_reqs) - without_ms) / num_reqs
        drafted_ms = (row_ms + draft.at(num_reqs) / num_reqs) * k
        drafted = (gains - tokens_per_ms * drafted_ms).max() + stopping_gain
        may_draft &= copies.gains - tokens_per_ms * row_ms * copies.rows <= drafted
    num_reqs = int(np.count_nonzero(may_draft))
    rows, num_more, tokens_by_k = base_rows, num_reqs * k, tokens + num_reqs * gains
    if copies and num_copied:  # drafts take the place of copies
        rows -= int(copies.rows[may_draft].sum())
        num_more[1:] -= base_rows - rows
        tokens_by_k[1:] -= copies.gains[may_draft].sum()
    missing = max(int(step.missing_rows[may_draft].sum()), num_reqs)
    backfill_ms = (draft.at(missing) - draft.at(num_reqs)) / _BACKFILL_STEPS
    ms = base_ms + target.ms(base_rows + num_more) - without_ms
    ms += k * draft.at(num_reqs)
    ms[1:] += costs.speculation_ms - copying_ms + backfill_ms
    value = tokens_by_k - tokens_per_ms * ms
    depth = int(value.argmax()) if num_reqs else 0
    gain = (value[depth] - value[0]) / max(tokens, tokens_per_ms * ms[depth], 1.0)
    gain += num_reqs * stopping_gain / max(tokens, 1.0)

    num_reqs, num_drafts = max(num_reqs, 1), max(num_reqs * depth, num_reqs, 1)
    draft_ms = draft.at(num_reqs) - draft.at(num_reqs // 2)
    draft_ms /= num_reqs - num_reqs // 2
    verify_ms = (target.at(rows + num_drafts) - target.at(rows)) / num_drafts
    return Plan(
        may_draft,
        depth,
        gain,
        tokens_per_ms,
        tokens_by_k,
        ms,
        rows,
        verify_ms,
        draft_ms,
        draft.at(num_reqs) - num_reqs * draft_ms,
    )
