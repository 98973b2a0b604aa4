"""The plan of a step: one number of drafts, the *depth*, for all requests that draft.

With tokens per millisecond as the measure of a step, a draft is worth its cost where
more tokens are expected of it than its time would bring at that rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_emssd.draft_length.cost import StepCosts
from vllm_emssd.draft_length.policy import Copies, StepInfo

_BACKFILL_STEPS = 32  # over which feeding text that the drafter missed is charged
_LEAST_MS = 1e-6


@dataclass(frozen=True, slots=True)
class Plan:
    """The best depth, and what time is worth then."""

    may_draft: np.ndarray  # [num_reqs] bool: the others copy, or cannot
    depth: int  # 0 if no drafts pay
    gain: float  # tokens a millisecond more than without drafts, as a share of those
    tokens_per_ms: float
    rows: int  # of the target, drafts aside
    verify_ms: float  # of the target, for a draft
    draft_ms: float  # of the drafter, for a request more in a forward
    forward_ms: float  # of a draft forward, however few requests are in it


def best_plan(step: StepInfo, acceptance: np.ndarray, costs: StepCosts) -> Plan:
    """The depth of most tokens a millisecond, 0 included.

    Args:
        acceptance: [K] by depth, K >= 1.
    """
    target, draft = costs.target, costs.draft
    copies = step.copies or Copies(*np.zeros((2, len(step.req_ids)), np.int64))
    all_rows = step.base_rows + int(copies.rows.sum())
    all_tokens = step.num_sampling + float(copies.gains.sum())
    # Prompts must be computed whatever the lengths: they move the target along its
    # curve, but a slow step with a prompt in it does not make drafts cheap.
    base_ms = costs.fixed_ms + target.at(all_rows - step.num_prefill_rows)
    base_ms = max(base_ms, _LEAST_MS)
    all_rows_ms = target.at(all_rows)
    without_drafts = all_tokens / base_ms

    k = np.arange(len(acceptance) + 1)
    gains = np.zeros(len(k))
    acceptance.cumprod().cumsum(out=gains[1:])
    may_draft = step.max_draft_tokens > 0
    num_reqs = max(int(np.count_nonzero(may_draft)), 1)
    # A request that gains more by its copy keeps it.
    row_ms = (target.at(all_rows + num_reqs) - all_rows_ms) / num_reqs
    drafts_ms = (row_ms + draft.at(num_reqs) / num_reqs) * k
    by_copy = copies.gains - without_drafts * row_ms * copies.rows
    may_draft &= by_copy <= (gains - without_drafts * drafts_ms).max()

    num_reqs = int(np.count_nonzero(may_draft))
    kept_rows = all_rows - int(copies.rows[may_draft].sum())
    rows, tokens = kept_rows + num_reqs * k, num_reqs * gains
    tokens += all_tokens - copies.gains[may_draft].sum()
    rows[0], tokens[0] = all_rows, all_tokens
    missing = max(int(step.missing_rows[may_draft].sum()), num_reqs)
    backfill_ms = (draft.at(missing) - draft.at(num_reqs)) / _BACKFILL_STEPS
    ms = base_ms + target.ms(rows) - all_rows_ms + k * draft.at(num_reqs)
    ms[1:] += costs.speculation_ms + backfill_ms
    rate = tokens / np.maximum(ms, _LEAST_MS)
    depth = int(rate.argmax()) if num_reqs else 0

    num_reqs, num_drafts = max(num_reqs, 1), max(num_reqs * depth, num_reqs, 1)
    draft_ms = draft.at(num_reqs) - draft.at(num_reqs // 2)
    draft_ms /= num_reqs - num_reqs // 2
    return Plan(
        may_draft,
        depth,
        rate[depth] / without_drafts - 1 if without_drafts else 0.0,
        float(rate[depth]),
        kept_rows,
        (target.at(kept_rows + num_drafts) - target.at(kept_rows)) / num_drafts,
        draft_ms,
        draft.at(num_reqs) - num_reqs * draft_ms,
    )
