"""Draft lengths by the price of time.

With lambda the tokens a millisecond earns, a thing is worth doing iff its expected
tokens exceed lambda times its milliseconds; the lambda of the best plan is its own
ratio of tokens to time (Dinkelbach 1967). A budget of rows is spent best on the
globally highest survivals, and since survival never grows along a request that gives
every request a prefix. Costs are staircases, so budgets are searched whole, not until
the first dip. Pure numpy: [num_reqs, K] arrays in, lengths out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vllm_emssd.draft_length.cost import CostTable
from vllm_emssd.draft_length.policy import Copies

_CATCH_UP_STEPS = 32  # over which feeding a request's missed text is charged
_DEAR_ROWS = 2.0  # charged to a request: worth a second look
_SMALL_BATCH = 8  # requests whose lengths are also tried one by one
_MOST_CHANGES = 8
_MOST_BUDGETS = 64
_LEAST_MS = 1e-6  # of a step: tables may say that everything is free


@dataclass(slots=True)
class StepCosts:
    """Prices of one step: both models' forwards, what a step costs besides, and what
    one that drafts costs more than that and its draft forwards."""

    target: CostTable
    draft: CostTable
    fixed_ms: float
    speculation_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Lengths to aim at, and the tokens a millisecond then earns."""

    draft_lens: np.ndarray  # [num_reqs] int64
    tokens_per_ms: float
    without_drafts: float  # tokens a millisecond

    @property
    def gain(self) -> float:
        """Tokens a millisecond more, as a share of those without drafts."""
        return self.tokens_per_ms / self.without_drafts - 1


@dataclass(frozen=True, slots=True)
class _Prices:
    """What plans of one step are compared by."""

    base_tokens: float
    base_ms: float  # of a step that decodes without drafts
    base_rows: int  # of the target, prefill included
    costs: StepCosts

    def tokens_per_ms(
        self,
        gains: np.ndarray,
        num_drafting: np.ndarray,
        num_verified: np.ndarray,
        first_rows: np.ndarray,
    ) -> np.ndarray:
        """Of drafting to each depth, 1 to K. [num_plans, K]

        Args:
            gains: [num_plans, K] survivals summed over the requests drafting there.
            num_drafting: [num_plans, K] requests at each position.
            num_verified: [num_plans, K] of their drafts, rows of the target.
            first_rows: [num_plans] rows of the first draft forward.
        """
        target, draft = self.costs.target, self.costs.draft
        draft_ms = draft.ms(num_drafting)
        draft_ms[:, 0] = draft.ms(first_rows)
        rows = self.base_rows + np.cumsum(num_verified, axis=1)
        verify_ms = target.ms(rows) - target.at(self.base_rows)
        draft_ms = np.cumsum(draft_ms, axis=1)
        tokens = self.base_tokens + np.cumsum(gains, axis=1)
        base_ms = self.base_ms + self.costs.speculation_ms
        # Given up copies may be worth a stair, but not more than the step.
        ms = np.maximum(base_ms + verify_ms + draft_ms, _LEAST_MS)
        ratio: np.ndarray = tokens / ms
        return ratio


def _by_survival(survival: np.ndarray) -> np.ndarray:
    """Flat indices of all possible drafts, the likeliest first; equals in order of
    request, then position: every leading part gives each request a prefix."""
    flat = survival.ravel()
    order = np.argsort(-flat, kind="stable")
    return order[: np.count_nonzero(flat > 0)]


def verified_lengths(
    survival: np.ndarray, base_rows: int, target: CostTable, tokens_per_ms: float
) -> np.ndarray:
    """How many drafts of each request are worth a row of the target.

    Args:
        survival: [num_reqs, K] non-growing along a row; 0 where there is no draft.
        base_rows: rows the target computes anyway.

    Returns: [num_reqs] int64.
    """
    num_reqs, num_positions = survival.shape
    order = _by_survival(survival)
    target_ms = target.from_to(base_rows, base_rows + order.size)
    budget = _best_budget(survival.ravel()[order], target_ms, tokens_per_ms)
    return np.bincount(order[:budget] // max(num_positions, 1), minlength=num_reqs)


def _best_budget(gains: np.ndarray, ms: np.ndarray, tokens_per_ms: float) -> int:
    """How many of the gains to take: [n] falling, at ms [n + 1] for 0 to n of them."""
    if gains.size == 0:
        return 0
    profit = gains.cumsum()
    profit -= tokens_per_ms * (ms[1:] - ms[0])
    best = int(profit.argmax())
    return best + 1 if profit[best] > 0 else 0


def plan(
    survival: np.ndarray,
    missing_rows: np.ndarray,
    num_sampling: int,
    num_prefill_rows: int,
    costs: StepCosts,
    base_tokens: float | None = None,
    verify_rows: np.ndarray | None = None,
    copies: Copies | None = None,
) -> Plan:
    """Best lengths from what is known before drafting.

    The price of time is that of decoding. Prompts must be computed whatever the
    lengths: they move the target along its staircase, but a slow step with a prompt in
    it does not make drafts cheap. Copies do count: what they bring makes time dear, and
    who drafts gives up its own.

    Args:
        survival: [num_reqs, K] expected survival, times what a token of the request is
            worth; 0 beyond what a request may draft.
        missing_rows: [num_reqs] rows the drafter must be fed before a first draft.
            All but one are an investment, charged over several steps.
        num_sampling: requests that get a token, and a row of the target, anyway.
        num_prefill_rows: the target's rows of prompts.
        base_tokens: what the tokens that come if none drafts are worth, if not 1 each;
            those of copies among them.
        verify_rows: [num_reqs, K] the target's rows to expect of each draft, if not 1:
            some of those made are not verified.
        copies: what is verified of who does not draft; gains times their worth.
    """
    num_reqs = len(survival)
    if copies is None:
        copies = Copies(np.zeros(num_reqs, dtype=np.int64), np.zeros(num_reqs))
    num_decode_rows = num_sampling + int(copies.rows.sum())
    base_ms = costs.fixed_ms + costs.target.at(num_decode_rows)
    base_ms = max(base_ms, _LEAST_MS)
    base_rows = num_decode_rows + num_prefill_rows
    if base_tokens is None:
        base_tokens = num_sampling + float(copies.gains.sum())
    without_drafts = base_tokens / base_ms
    nothing = np.zeros(num_reqs, dtype=np.int64)
    best = Plan(nothing, without_drafts, without_drafts)
    if survival.size == 0:
        return best
    prices = _Prices(base_tokens, base_ms, base_rows, costs)
    drafts = _Drafts.instead_of(copies, survival, missing_rows, verify_rows)
    for may_draft in drafts.who_may(prices):
        best = _best_prefixes(drafts, may_draft, prices, best)
    if num_reqs == 1 and survival.size <= _MOST_BUDGETS:
        return best  # each of its lengths was tried
    return _change_one_by_one(drafts, prices, best)


@dataclass(frozen=True, slots=True)
class _Drafts:
    """What each draft brings and costs. [num_reqs, K], or [num_reqs]"""

    survival: np.ndarray  # times what a token of the request is worth
    gains: np.ndarray  # the same, less what the request's copy would bring, at once
    rows: np.ndarray  # of the target, less those of the copy
    first_rows: np.ndarray  # [num_reqs] charged for the first draft forward
    has_copy: np.ndarray  # [num_reqs] bool

    @classmethod
    def instead_of(
        cls,
        copies: Copies,
        survival: np.ndarray,
        missing_rows: np.ndarray,
        verify_rows: np.ndarray | None,
    ) -> _Drafts:
        missing = np.maximum(missing_rows, 1)
        first_rows = 1 + (missing - 1) / _CATCH_UP_STEPS
        rows = np.ones_like(survival) if verify_rows is None else verify_rows
        has_copy = copies.rows > 0
        if not has_copy.any():
            return cls(survival, survival, rows, first_rows, has_copy)
        gains, rows = survival.copy(), rows.copy()
        gains[:, 0] -= copies.gains
        rows[:, 0] -= copies.rows
        return cls(survival, gains, rows, first_rows, has_copy)

    def who_may(self, prices: _Prices) -> Iterator[np.ndarray]:
        """Sets of requests, among which the best drafts are looked for: with those that
        are dear to catch up and without; with those that a copy would serve worse, and
        without any that have one. [num_reqs] bool each"""
        dearness = np.log2(self.first_rows).astype(np.int64)  # 0 up to 32 missing rows
        rather_draft = self.has_copy
        if len(rather_draft) > _SMALL_BATCH:  # else single ones are left out later
            rather_draft = rather_draft & (self._advantage(prices) > 0)
        for most in np.unique(dearness) if dearness.any() else (0,):
            affordable = dearness <= most
            yield affordable & ~self.has_copy
            if (rather_draft & affordable).any():
                yield affordable & (rather_draft | ~self.has_copy)

    def _advantage(self, prices: _Prices) -> np.ndarray:
        """Of drafts over a copy, in tokens, if half of the requests drafted beside each
        other and each row cost the average. [num_reqs] float64"""
        target, draft = prices.costs.target, prices.costs.draft
        num_reqs, base_rows = len(self.survival), prices.base_rows
        half = max(num_reqs // 2, 1)
        row_ms = (target.at(base_rows + num_reqs) - target.at(base_rows)) / num_reqs
        draft_ms = draft.at(half) / half
        tokens_per_ms = prices.base_tokens / prices.base_ms
        value = self.gains - tokens_per_ms * (self.rows * row_ms + draft_ms)
        return np.asarray(value.cumsum(axis=1).max(axis=1))


def plan_copies(
    gains: np.ndarray,
    num_decode_rows: int,
    num_prefill_rows: int,
    costs: StepCosts,
    base_tokens: float,
) -> Plan:
    """Best lengths of drafts that are made already: they cost the target's rows only,
    so that of each budget of rows the best use is known, and all are compared.

    Args:
        gains: [num_reqs, K] expected survival, times what a token of the request is
            worth; 0 where there is no copy.
        base_tokens: what the tokens that come anyway are worth.
    """
    order = _by_survival(gains)
    base_rows = num_decode_rows + num_prefill_rows
    base_ms = max(costs.fixed_ms + costs.target.at(num_decode_rows), _LEAST_MS)
    tokens = np.empty(order.size + 1)
    tokens[0] = base_tokens
    tokens[1:] = base_tokens + gains.ravel()[order].cumsum()
    target_ms = costs.target.from_to(base_rows, base_rows + order.size)
    ratio = tokens / (base_ms + (target_ms - target_ms[0]))
    budget = int(ratio.argmax())
    num_reqs, num_positions = gains.shape
    lens = np.bincount(order[:budget] // max(num_positions, 1), minlength=num_reqs)
    return Plan(lens, float(ratio[budget]), float(ratio[0]))


def _best_prefixes(
    drafts: _Drafts, may_draft: np.ndarray, prices: _Prices, least: Plan
) -> Plan:
    """Try the n likeliest drafts of those requests, for every n or every few, cut at
    every depth."""
    order = _by_survival(np.where(may_draft[:, None], drafts.survival, 0.0))
    if order.size == 0:
        return least
    num_reqs, num_positions = drafts.survival.shape
    request, position = np.divmod(order, num_positions)
    step = -(-order.size // _MOST_BUDGETS)
    budgets = np.append(np.arange(step, order.size, step), order.size)
    cell = np.arange(order.size) // step * num_positions + position

    def at_budgets(weights: np.ndarray | None) -> np.ndarray:
        sums = np.bincount(cell, weights, minlength=budgets.size * num_positions)
        return sums.reshape(budgets.size, num_positions).cumsum(axis=0)

    ratio = prices.tokens_per_ms(
        at_budgets(drafts.gains.ravel()[order]),
        at_budgets(None),
        at_budgets(drafts.rows.ravel()[order]),
        at_budgets(np.where(position == 0, drafts.first_rows[request], 0.0))[:, 0],
    )
    found, depth = np.divmod(int(ratio.argmax()), num_positions)
    if ratio[found, depth] <= least.tokens_per_ms:
        return least
    lens = np.bincount(request[: budgets[found]], minlength=num_reqs)
    lens = np.minimum(lens, depth + 1)
    return replace(least, draft_lens=lens, tokens_per_ms=float(ratio[found, depth]))


def _change_one_by_one(drafts: _Drafts, prices: _Prices, best: Plan) -> Plan:
    """Change one request's length at a time while that helps: in small batches, where
    each stair counts, and of who is dear to catch up in large ones."""
    first_rows = drafts.first_rows
    num_reqs, num_positions = drafts.survival.shape
    is_dear = first_rows >= _DEAR_ROWS
    chosen = (
        np.arange(num_reqs) if num_reqs <= _SMALL_BATCH else np.flatnonzero(is_dear)
    )
    chosen = chosen[drafts.survival[chosen, 0] > 0][:_SMALL_BATCH]
    if not chosen.size:
        return best
    new_lens = np.arange(num_positions + 1)
    becomes = new_lens[:, None] > np.arange(num_positions)  # [K + 1, K] is drafted
    one_each = np.ones_like(drafts.survival)
    for _ in range(_MOST_CHANGES):
        does_draft = best.draft_lens > 0
        is_now = best.draft_lens[:, None] > np.arange(num_positions)
        rows_of_others = (
            first_rows[does_draft].sum() - (first_rows * does_draft)[chosen]
        )
        ratio = prices.tokens_per_ms(
            _changed(drafts.gains, is_now, chosen, becomes),
            _changed(one_each, is_now, chosen, becomes),
            _changed(drafts.rows, is_now, chosen, becomes),
            (
                rows_of_others[:, None] + first_rows[chosen, None] * becomes[:, 0]
            ).ravel(),
        )[:, -1]
        found = int(ratio.argmax())
        if ratio[found] <= best.tokens_per_ms * (1 + 1e-9):
            break
        lens = best.draft_lens.copy()
        lens[chosen[found // new_lens.size]] = found % new_lens.size
        best = replace(best, draft_lens=lens, tokens_per_ms=float(ratio[found]))
    return best


def _changed(
    weights: np.ndarray, is_now: np.ndarray, chosen: np.ndarray, becomes: np.ndarray
) -> np.ndarray:
    """Sums over all requests of what they draft, one at a time of the `chosen` changed
    to each of the lengths that `becomes` [K + 1, K] stands for.

    `weights`, `is_now`: [num_reqs, K]. Returns [num_chosen * (K + 1), K].
    """
    weighted = weights * is_now
    others = weighted.sum(axis=0) - weighted[chosen]
    sums = others[:, None] + becomes * weights[chosen, None]
    return np.asarray(sums.reshape(-1, weights.shape[1]))


def worth_another_forward(
    gain: np.ndarray,
    draft: CostTable,
    verify_ms: np.ndarray,
    tokens_per_ms: float,
) -> np.ndarray:
    """Which requests go on drafting: [num_drafting] bool, all False if none pays.

    Args:
        gain: [num_drafting] expected survival of each one's next draft, times what a
            token of the request is worth; 0 if it may not.
        draft: prices of a draft forward.
        verify_ms: [num_drafting + 1] the target's price with none of these drafts, one,
            ..., all. Convex, or a stair is not climbed though its width would pay.
    """
    order = _by_survival(gain)
    most = order.size
    ms = draft.from_to(0, most) + verify_ms[: most + 1]
    goes_on = np.zeros(gain.size, dtype=bool)
    goes_on[order[: _best_budget(gain[order], ms, tokens_per_ms)]] = True
    return goes_on
