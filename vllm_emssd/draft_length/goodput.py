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

_ITERATIONS = 4  # Dinkelbach converges superlinearly


@dataclass(slots=True)
class StepCosts:
    """Prices of one step: both models' forwards and what a step costs besides."""

    target: CostTable
    draft: CostTable
    fixed_ms: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Lengths to aim at, and the tokens a millisecond then earns."""

    draft_lens: np.ndarray  # [num_reqs] int64
    tokens_per_ms: float


def verified_lengths(
    survival: np.ndarray, base_rows: int, target: CostTable, tokens_per_ms: float
) -> np.ndarray:
    """How many drafts of each request are worth a row of the target.

    Args:
        survival: [num_reqs, K] non-growing along a row; 0 where there is no draft.
        base_rows: rows the target computes anyway.

    Returns: [num_reqs] int64.
    """
    flat = np.sort(survival, axis=None)[::-1]
    flat = flat[flat > 0]
    if flat.size == 0:
        return np.zeros(len(survival), dtype=np.int64)
    rows = base_rows + np.arange(flat.size + 1)
    gain = np.concatenate(([0.0], np.cumsum(flat)))
    best = int((gain - tokens_per_ms * target.ms(rows)).argmax())
    if best == 0:
        return np.zeros(len(survival), dtype=np.int64)
    return (survival >= flat[best - 1]).sum(axis=1)


def plan(
    survival: np.ndarray, missing_rows: np.ndarray, base_rows: int, costs: StepCosts
) -> Plan:
    """Best lengths from what is known before drafting.

    Args:
        survival: [num_reqs, K] expected survival; 0 beyond what a request may draft.
        missing_rows: [num_reqs] rows the drafter must be fed before a first draft.
        base_rows: rows the target computes anyway, one a sampling request and all of
            prefill. Their cost is paid whatever the lengths.
    """
    num_reqs = len(survival)
    nothing = np.zeros(num_reqs, dtype=np.int64)
    base_ms = costs.fixed_ms + float(costs.target.ms(np.array(base_rows)))
    best = Plan(nothing, num_reqs / base_ms)
    if survival.size == 0:
        return best
    for _ in range(_ITERATIONS):
        lens = verified_lengths(survival, base_rows, costs.target, best.tokens_per_ms)
        found = _best_depth(survival, lens, missing_rows, base_rows, costs, best)
        if found.tokens_per_ms <= best.tokens_per_ms * (1 + 1e-6):
            break
        best = found
    return best


def _best_depth(
    survival: np.ndarray,
    lens: np.ndarray,
    missing_rows: np.ndarray,
    base_rows: int,
    costs: StepCosts,
    so_far: Plan,
) -> Plan:
    """Cut all lengths at the depth that pays for its draft forwards best."""
    num_reqs, num_positions = survival.shape
    depths = np.arange(num_positions + 1)
    drafting = (lens[:, None] > np.arange(num_positions)).astype(np.float64)
    tokens = num_reqs + np.cumsum((survival * drafting).sum(axis=0))
    num_drafting = drafting.sum(axis=0)
    draft_rows = num_drafting.copy()
    draft_rows[0] = float((missing_rows * (lens > 0)).sum())
    ms = (
        costs.fixed_ms
        + costs.target.ms(base_rows + np.cumsum(num_drafting))
        + np.cumsum(costs.draft.ms(draft_rows))
    )
    ratio = tokens / ms
    ratio[num_drafting == 0] = 0.0
    depth = depths[int(ratio.argmax()) + 1]
    if ratio[depth - 1] <= so_far.tokens_per_ms:
        return so_far
    return Plan(np.minimum(lens, depth), float(ratio[depth - 1]))


def worth_another_forward(
    survival: np.ndarray,
    next_acceptance: np.ndarray,
    verify_rows: int,
    costs: StepCosts,
    tokens_per_ms: float,
) -> np.ndarray:
    """Which requests go on drafting: [num_drafting] bool, all False if none pays.

    Args:
        survival: [num_drafting] of the latest draft of each request.
        next_acceptance: [num_drafting] expected of its next one.
        verify_rows: rows of the target so far, drafts included.
    """
    gain = np.sort(survival * next_acceptance)[::-1]
    counts = np.arange(gain.size + 1)
    extra_ms = costs.draft.ms(counts) + costs.target.ms(verify_rows + counts)
    profit = np.concatenate(([0.0], np.cumsum(gain))) - tokens_per_ms * extra_ms
    best = int(profit.argmax())
    if best == 0:
        return np.zeros(gain.size, dtype=bool)
    return survival * next_acceptance >= gain[best - 1]
