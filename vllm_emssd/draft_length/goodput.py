"""Draft lengths by the price of time.

With lambda the tokens a millisecond earns, a thing is worth doing iff its expected
tokens exceed lambda times its milliseconds; the lambda of the best plan is its own
ratio of tokens to time (Dinkelbach 1967). A budget of rows is spent best on the
globally highest survivals, and since survival never grows along a request that gives
every request a prefix. Costs are staircases, so budgets are searched whole, not until
the first dip. [num_reqs, K] arrays in, lengths out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_emssd.draft_length import plan_search
from vllm_emssd.draft_length.catch_up import MOST_STEPS
from vllm_emssd.draft_length.cost import CostTable
from vllm_emssd.draft_length.plan_search import LEAST_MS, Drafts, Prices
from vllm_emssd.draft_length.policy import Copies


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
    catch_up_steps: float = MOST_STEPS,
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
            All but one are an investment, charged over `catch_up_steps`.
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
    base_ms = max(base_ms, LEAST_MS)
    base_rows = num_decode_rows + num_prefill_rows
    if base_tokens is None:
        base_tokens = num_sampling + float(copies.gains.sum())
    without_drafts = base_tokens / base_ms
    if survival.size == 0:
        nothing = np.zeros(num_reqs, dtype=np.int64)
        return Plan(nothing, without_drafts, without_drafts)
    prices = Prices(
        base_tokens,
        base_ms,
        float(base_rows),
        costs.speculation_ms,
        costs.target.curve,
        costs.draft.curve,
    )
    first_rows = 1 + (np.maximum(missing_rows, 1) - 1) / catch_up_steps
    drafts = _instead_of(copies, survival, first_rows, verify_rows)
    lens, tokens_per_ms = plan_search.search(drafts, prices)
    return Plan(lens, tokens_per_ms, without_drafts)


def get_ready() -> None:
    """Have the searches compiled (seconds, once on a machine), not by the first step
    that drafts."""
    free = CostTable([1], [1.0])
    plan(np.ones((1, 1)), np.ones(1), 1, 0, StepCosts(free, free, 1.0))
    worth_another_forward(np.ones(1), free, np.ones(2), 1.0)


def _instead_of(
    copies: Copies,
    survival: np.ndarray,
    first_rows: np.ndarray,
    verify_rows: np.ndarray | None,
) -> Drafts:
    rows = np.ones(survival.shape) if verify_rows is None else verify_rows.copy()
    gains = survival.copy()
    gains[:, 0] -= copies.gains
    rows[:, 0] -= copies.rows
    return Drafts(survival.copy(), gains, rows, first_rows, copies.rows > 0)


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
    base_ms = max(costs.fixed_ms + costs.target.at(num_decode_rows), LEAST_MS)
    tokens = np.empty(order.size + 1)
    tokens[0] = base_tokens
    tokens[1:] = base_tokens + gains.ravel()[order].cumsum()
    target_ms = costs.target.from_to(base_rows, base_rows + order.size)
    ratio = tokens / (base_ms + (target_ms - target_ms[0]))
    budget = int(ratio.argmax())
    num_reqs, num_positions = gains.shape
    lens = np.bincount(order[:budget] // max(num_positions, 1), minlength=num_reqs)
    return Plan(lens, float(ratio[budget]), float(ratio[0]))


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
    assert len(verify_ms) > gain.size, "compiled code reads on"
    return plan_search.worth_another_forward(
        gain.copy(), draft.curve, verify_ms, tokens_per_ms
    )
