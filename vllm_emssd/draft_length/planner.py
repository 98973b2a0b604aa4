"""The plan of a step: one number of drafts, the *depth*, for all requests that draft.

A draft is worth its cost where more tokens are expected of it than its time brings
otherwise, in the long run. A request with a copy keeps it or drafts, which is decided
together with the depth: a request more in draft forwards that are run anyway costs
little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_emssd.draft_length.cost import StepCosts
from vllm_emssd.draft_length.policy import Copies, StepInfo

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
    target, draft, k = costs.target, costs.draft, np.arange(len(acceptance) + 1)
    gains = np.zeros(len(k))
    acceptance.cumprod().cumsum(out=gains[1:])
    may_draft = step.max_draft_tokens > 0
    copies = step.copies or Copies.none(len(may_draft))
    # Requests that may draft in place of their copy, those whose copies bring least
    # first; below, 0, 1, ... of them do.
    either = np.flatnonzero(may_draft & (copies.rows > 0))
    worth = copies.gains - tokens_per_ms * _row_ms(step, costs) * copies.rows
    either = either[np.argsort(worth[either], kind="stable")]
    drafting = np.count_nonzero(may_draft) - len(either) + np.arange(len(either) + 1)
    missing = step.missing_rows * may_draft
    given_up = np.zeros((3, len(drafting)))  # sums over these requests
    of_each = np.stack((copies.rows, copies.gains, missing))[:, either]
    of_each.cumsum(axis=1, out=given_up[:, 1:])
    copied_rows = copies.rows.sum() - given_up[0]
    copied = copies.gains.sum() - given_up[1]
    missed = missing.sum() - given_up[2, -1] + given_up[2]

    # [copies given up, depth]
    tokens = drafting[:, None] * gains
    tokens += step.num_sampling + copied[:, None]
    rows = step.base_rows + copied_rows
    # Prompts must be computed whatever the lengths: they move the target along its
    # curve, but a slow step with a prompt in it does not make drafts cheap.
    ms = target.ms(rows[:, None] + drafting[:, None] * k) - target.at(step.base_rows)
    ms += costs.fixed_ms + target.at(step.num_sampling)
    forward_ms = draft.ms(drafting)
    ms += forward_ms[:, None] * k
    backfill_ms = draft.ms(np.maximum(missed, drafting)) - forward_ms
    ms[:, 1:] += costs.speculation_ms + backfill_ms[:, None] / _BACKFILL_STEPS
    ms[:, 0] += costs.copying_ms * (copied_rows > 0)
    value = tokens + drafting[:, None] * stopping_gain - tokens_per_ms * ms
    num_given_up, depth = divmod(int(value.argmax()), len(k))
    without_drafts = tokens[0, 0] - tokens_per_ms * ms[0, 0]
    gain = value[num_given_up, depth] - without_drafts
    gain /= max(tokens[0, 0], tokens_per_ms * ms[num_given_up, depth], 1.0)

    may_draft[either[num_given_up:]] = False
    num_reqs = max(int(drafting[num_given_up]), 1)
    num_drafts = num_reqs * max(depth, 1)
    draft_ms = draft.at(num_reqs) - draft.at(num_reqs // 2)
    draft_ms /= num_reqs - num_reqs // 2
    num_rows = int(rows[num_given_up])
    verify_ms = (target.at(num_rows + num_drafts) - target.at(num_rows)) / num_drafts
    return Plan(
        may_draft,
        depth,
        float(gain),
        tokens_per_ms,
        np.where(k, tokens[num_given_up], tokens[0, 0]),
        np.where(k, ms[num_given_up], ms[0, 0]),
        num_rows,
        verify_ms,
        draft_ms,
        draft.at(num_reqs) - num_reqs * draft_ms,
    )


def _row_ms(step: StepInfo, costs: StepCosts) -> float:
    """Of the target, for each of as many rows more as there are requests."""
    num_reqs = max(step.num_sampling, 1)
    rows = step.base_rows + (int(step.copies.rows.sum()) if step.copies else 0)
    return (costs.target.at(rows + num_reqs) - costs.target.at(rows)) / num_reqs
