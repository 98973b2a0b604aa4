"""The plan of a step: one number of drafts, the *depth*, for all requests that draft.

A draft is worth its cost where more tokens are expected of it than its time brings
otherwise, in the long run. Which requests keep their copies is decided together with
the depth: once the draft model runs for some requests, one more costs little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_emssd.draft_length.cost import StepCosts
from vllm_emssd.draft_length.policy import Copies, StepInfo

_BACKFILL_STEPS = 32  # over which feeding text that the drafter missed is charged
_KEEP = 0.95  # weight of earlier steps in the long-run rate, at each new one
_LEAST_MS = 1e-6


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


@dataclass(frozen=True, slots=True)
class _Drafting:
    """Requests that may draft in place of their copy: what holds if the first 0, 1, ...
    of them do, and all without a copy. Arrays are [len(with_copies) + 1]."""

    with_copies: np.ndarray  # of the batch, those whose copies bring least first
    num_reqs: np.ndarray  # that draft
    missing_rows: np.ndarray  # that the drafter needs before
    copied_rows: np.ndarray  # of the target
    copied_tokens: np.ndarray  # expected to be accepted


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
    drafting = _drafting(step, costs, tokens_per_ms)
    # [copies given up, depth]
    tokens = drafting.num_reqs[:, None] * gains
    tokens += step.num_sampling + drafting.copied_tokens[:, None]
    ms = _step_ms(step, drafting, costs, k)
    value = tokens + drafting.num_reqs[:, None] * stopping_gain - tokens_per_ms * ms
    given_up, depth = divmod(int(value.argmax()), len(k))
    without_drafts = tokens[0, 0] - tokens_per_ms * ms[0, 0]
    gain = value[given_up, depth] - without_drafts
    gain /= max(tokens[0, 0], tokens_per_ms * ms[given_up, depth], 1.0)

    may_draft = step.max_draft_tokens > 0
    may_draft[drafting.with_copies[given_up:]] = False
    num_reqs = max(int(drafting.num_reqs[given_up]), 1)
    num_drafts = num_reqs * max(depth, 1)
    draft_ms = draft.at(num_reqs) - draft.at(num_reqs // 2)
    draft_ms /= num_reqs - num_reqs // 2
    rows = step.base_rows + int(drafting.copied_rows[given_up])
    return Plan(
        may_draft,
        depth,
        float(gain),
        tokens_per_ms,
        np.where(k, tokens[given_up], tokens[0, 0]),
        np.where(k, ms[given_up], ms[0, 0]),
        rows,
        (target.at(rows + num_drafts) - target.at(rows)) / num_drafts,
        draft_ms,
        draft.at(num_reqs) - num_reqs * draft_ms,
    )


def _drafting(step: StepInfo, costs: StepCosts, tokens_per_ms: float) -> _Drafting:
    may_draft = step.max_draft_tokens > 0
    n = len(may_draft)
    copies = step.copies or Copies(np.zeros(n, np.int64), np.zeros(n))
    missing = step.missing_rows * may_draft
    # What each copy brings, where a row costs what a row more for each request does.
    num_reqs = max(step.num_sampling, 1)
    rows = step.base_rows + int(copies.rows.sum())
    row_ms = (costs.target.at(rows + num_reqs) - costs.target.at(rows)) / num_reqs
    net_gains = copies.gains - tokens_per_ms * row_ms * copies.rows
    with_copies = np.flatnonzero(may_draft & (copies.rows > 0))
    with_copies = with_copies[np.argsort(net_gains[with_copies], kind="stable")]

    first = np.zeros((3, len(with_copies) + 1))  # sums over the first of them
    of_each = np.stack((missing, copies.rows, copies.gains))[:, with_copies]
    of_each.cumsum(axis=1, out=first[:, 1:])
    without_copies = np.count_nonzero(may_draft) - len(with_copies)
    return _Drafting(
        with_copies,
        without_copies + np.arange(len(with_copies) + 1),
        missing.sum() - first[0, -1] + first[0],
        copies.rows.sum() - first[1],
        copies.gains.sum() - first[2],
    )


def _step_ms(
    step: StepInfo, drafting: _Drafting, costs: StepCosts, k: np.ndarray
) -> np.ndarray:
    """Of the step without its prompts. [copies given up, depth]"""
    target, draft, num_reqs = costs.target, costs.draft, drafting.num_reqs
    rows = step.base_rows + drafting.copied_rows
    # Prompts must be computed whatever the lengths: they move the target along its
    # curve, but a slow step with a prompt in it does not make drafts cheap.
    ms = target.ms(rows[:, None] + num_reqs[:, None] * k) - target.at(step.base_rows)
    ms += costs.fixed_ms + target.at(step.num_sampling)
    forward_ms = draft.ms(num_reqs)
    ms += forward_ms[:, None] * k
    backfill_ms = draft.ms(np.maximum(drafting.missing_rows, num_reqs)) - forward_ms
    ms[:, 1:] += costs.speculation_ms + backfill_ms[:, None] / _BACKFILL_STEPS
    ms[:, 0] += costs.copying_ms * (drafting.copied_rows > 0)
    return ms


class LongRunRate:
    """Tokens a millisecond in the long run, which is what a step's time is worth.

    Steps differ: in some nearly all tokens are copied, in others none can be. Choosing
    the highest rate in each of them is not the highest in all: what a draft brings in a
    slow step must be worth what that time brings in other steps. It is kept as a
    multiple of what steps without drafts give, so that it holds for other numbers of
    requests too.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._tokens = self._ms = 1.0  # over those of steps without drafts

    def tokens_per_ms(self, num_reqs: int) -> float:
        return self._tokens / self._ms * num_reqs / self._plain_ms(num_reqs)

    def step_planned(self, num_reqs: int, tokens: float, ms: float) -> None:
        """A step that is expected to give so many tokens in so many milliseconds."""
        self._tokens += (1 - _KEEP) * (tokens / max(num_reqs, 1) - self._tokens)
        self._ms += (1 - _KEEP) * (ms / self._plain_ms(num_reqs) - self._ms)

    def _plain_ms(self, num_reqs: int) -> float:
        return max(self._costs.fixed_ms + self._costs.target.at(num_reqs), _LEAST_MS)
