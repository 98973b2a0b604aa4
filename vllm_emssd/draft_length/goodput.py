"""Draft lengths by the price of time.

With lambda the tokens a millisecond earns, a thing is worth doing iff its expected
tokens exceed lambda times its milliseconds; the lambda of the best plan is its own
ratio of tokens to time (Dinkelbach 1967). A budget of rows is spent best on the
globally highest survivals, and since survival never grows along a request that gives
every request a prefix. Costs are staircases, so budgets are searched whole, not until
the first dip. Pure numpy: [num_reqs, K] arrays in, lengths out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_emssd.draft_length.cost import CostTable

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
        ratio: np.ndarray = tokens / (base_ms + verify_ms + draft_ms)
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
    num_other_rows: int = 0,
) -> Plan:
    """Best lengths from what is known before drafting.

    The price of time is that of decoding. Prompts must be computed whatever the
    lengths: they move the target along its staircase, but a slow step with a prompt in
    it does not make drafts cheap. Drafts made elsewhere do count: what they bring makes
    time dear.

    Args:
        survival: [num_reqs, K] expected survival, times what a token of the request is
            worth; 0 beyond what a request may draft.
        missing_rows: [num_reqs] rows the drafter must be fed before a first draft.
            All but one are an investment, charged over several steps.
        num_sampling: requests that get a token, and a row of the target, anyway.
        num_prefill_rows: the target's rows of prompts.
        base_tokens: what the tokens that come anyway are worth, if not 1 each; those of
            drafts made elsewhere among them.
        verify_rows: [num_reqs, K] the target's rows to expect of each draft, if not 1:
            some of those made are not verified.
        num_other_rows: the target's rows of drafts made elsewhere.
    """
    num_decode_rows = num_sampling + num_other_rows
    base_ms = costs.fixed_ms + costs.target.at(num_decode_rows)
    base_ms = max(base_ms, _LEAST_MS)
    base_rows = num_decode_rows + num_prefill_rows
    if base_tokens is None:
        base_tokens = num_sampling
    prices = _Prices(base_tokens, base_ms, base_rows, costs)
    missing = np.maximum(missing_rows, 1)
    charged = 1 + (missing - 1) / _CATCH_UP_STEPS
    nothing = np.zeros(len(survival), dtype=np.int64)
    best = Plan(nothing, base_tokens / base_ms)
    if survival.size == 0:
        return best
    if verify_rows is None:
        verify_rows = np.ones_like(survival)
    dearness = np.log2(charged).astype(np.int64)  # 0 up to 32 missing rows
    for most in np.unique(dearness) if dearness.any() else (0,):
        affordable = np.where(dearness[:, None] <= most, survival, 0.0)
        best = _best_prefixes(affordable, verify_rows, charged, prices, best)
    return _change_one_by_one(survival, verify_rows, charged, prices, best)


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
    return Plan(lens, float(ratio[budget]))


def _best_prefixes(
    survival: np.ndarray,
    verify_rows: np.ndarray,
    first_rows: np.ndarray,
    prices: _Prices,
    least: Plan,
) -> Plan:
    """Try the n likeliest drafts, for every n or every few, cut at every depth."""
    order = _by_survival(survival)
    if order.size == 0:
        return least
    num_reqs, num_positions = survival.shape
    request, position = np.divmod(order, num_positions)
    step = -(-order.size // _MOST_BUDGETS)
    budgets = np.append(np.arange(step, order.size, step), order.size)
    cell = np.arange(order.size) // step * num_positions + position

    def at_budgets(weights: np.ndarray | None) -> np.ndarray:
        sums = np.bincount(cell, weights, minlength=budgets.size * num_positions)
        return sums.reshape(budgets.size, num_positions).cumsum(axis=0)

    ratio = prices.tokens_per_ms(
        at_budgets(survival.ravel()[order]),
        at_budgets(None),
        at_budgets(verify_rows.ravel()[order]),
        at_budgets(np.where(position == 0, first_rows[request], 0.0))[:, 0],
    )
    found, depth = np.divmod(int(ratio.argmax()), num_positions)
    if ratio[found, depth] <= least.tokens_per_ms:
        return least
    lens = np.bincount(request[: budgets[found]], minlength=num_reqs)
    return Plan(np.minimum(lens, depth + 1), float(ratio[found, depth]))


def _change_one_by_one(
    survival: np.ndarray,
    verify_rows: np.ndarray,
    first_rows: np.ndarray,
    prices: _Prices,
    best: Plan,
) -> Plan:
    """Change one request's length at a time while that helps: in small batches, where
    each stair counts, and of who is dear to catch up in large ones."""
    num_reqs, num_positions = survival.shape
    is_dear = first_rows >= _DEAR_ROWS
    chosen = (
        np.arange(num_reqs) if num_reqs <= _SMALL_BATCH else np.flatnonzero(is_dear)
    )
    chosen = chosen[survival[chosen, 0] > 0][:_SMALL_BATCH]
    if not chosen.size:
        return best
    new_lens = np.arange(num_positions + 1)
    becomes = new_lens[:, None] > np.arange(num_positions)  # [K + 1, K] is drafted
    one_each = np.ones_like(survival)
    for _ in range(_MOST_CHANGES):
        drafts = best.draft_lens > 0
        is_now = best.draft_lens[:, None] > np.arange(num_positions)
        rows_of_others = first_rows[drafts].sum() - (first_rows * drafts)[chosen]
        ratio = prices.tokens_per_ms(
            _changed(survival, is_now, chosen, becomes),
            _changed(one_each, is_now, chosen, becomes),
            _changed(verify_rows, is_now, chosen, becomes),
            (
                rows_of_others[:, None] + first_rows[chosen, None] * becomes[:, 0]
            ).ravel(),
        )[:, -1]
        found = int(ratio.argmax())
        if ratio[found] <= best.tokens_per_ms * (1 + 1e-9):
            break
        lens = best.draft_lens.copy()
        lens[chosen[found // new_lens.size]] = found % new_lens.size
        best = Plan(lens, float(ratio[found]))
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
