"""The searches of `goodput`, compiled: they run in every step that may draft, one after
each draft forward.

A plan is worth its tokens over its milliseconds. Of the many lengths few can be tried:
the likeliest drafts, for every number of them or every few and every depth, among
several sets of requests; then, in batches that are not too large, one request's length
after the other is changed while that helps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite.binding import ffi
from numba import njit

from vllm_emssd.draft_length.cost import Curve

# vLLM's CPU worker reads `vars()` of whatever the modules of its process hold, and
# llvmlite takes that name for a function of its library: the worker would not start.
getattr(ffi.lib, "_fntab", {})["__dict__"] = {}

LEAST_MS = 1e-6  # of a step: tables may say that everything is free
_MOST_BUDGETS = 256  # numbers of drafts tried in each set of requests
_MOST_SWEEPS = 4  # over all requests, changing their lengths one at a time,
_MOST_CHANGES = 1024  # or as many as try no more lengths than that
_CERTAINLY_BETTER = 1 + 1e-9  # than rounding makes it
_GAINED, _COUNTED, _VERIFIED, _FIRST_ROWS = range(4)  # rows of the sums


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Kept on disk for the next start, if there is a place for it."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        return njit(function)


class Drafts(NamedTuple):
    """What each draft brings and costs. [num_reqs, K], or [num_reqs]; K >= 1"""

    survival: np.ndarray  # times what a token of the request is worth
    gains: np.ndarray  # the same, less what the request's copy would bring, at once
    rows: np.ndarray  # of the target, less those of the copy
    first_rows: np.ndarray  # [num_reqs] charged for the first draft forward
    has_copy: np.ndarray  # [num_reqs] bool


class Prices(NamedTuple):
    """What plans of one step are compared by."""

    base_tokens: float
    base_ms: float  # of a step that decodes without drafts
    base_rows: float  # of the target, prefill included
    speculation_ms: float  # of a step that drafts, besides its forwards
    target: Curve
    draft: Curve


@_compiled
def search(drafts: Drafts, prices: Prices) -> tuple[np.ndarray, float]:
    """The best lengths found, and the tokens a millisecond they earn.

    Drafts are looked for among several sets of requests: with those that are dear to
    catch up and without; without any that have a copy, with those of them that it
    serves worse, and with all.

    Returns: [num_reqs] int64, and a float.
    """
    lens = np.zeros(len(drafts.survival), dtype=np.int64)
    order = np.argsort(-drafts.survival.ravel(), kind="mergesort")
    dearness = np.log2(drafts.first_rows).astype(np.int64)  # 0 below 2 rows
    has_none = ~drafts.has_copy
    sets = [has_none]
    if drafts.has_copy.any():
        sets.append(has_none | (_advantage(drafts, prices) > 0))
        sets.append(np.ones_like(has_none))
    best = prices.base_tokens / prices.base_ms  # without drafts
    for most in range(dearness.max() + 1):
        if (dearness == most).any():
            for may_draft in sets:
                may = may_draft & (dearness <= most)
                best = _best_prefix(drafts, prices, order, may, lens, best)
    return lens, _change_one_by_one(drafts, prices, lens, best)


@_compiled
def worth_another_forward(
    gain: np.ndarray, draft: Curve, verify_ms: np.ndarray, tokens_per_ms: float
) -> np.ndarray:
    """See `goodput.worth_another_forward`."""
    order = np.argsort(-gain, kind="mergesort")
    profit, best, budget = 0.0, 0.0, 0
    for i in range(order.size):
        if gain[order[i]] <= 0:
            break
        profit += gain[order[i]]
        ms = _ms(draft, i + 1) + verify_ms[i + 1] - verify_ms[0]
        if profit - tokens_per_ms * ms > best:
            best, budget = profit - tokens_per_ms * ms, i + 1
    goes_on = np.zeros(gain.size, dtype=np.bool_)
    goes_on[order[:budget]] = True
    return goes_on


@_compiled
def _advantage(drafts: Drafts, prices: Prices) -> np.ndarray:
    """Of drafts over a copy, in tokens, if half of the requests drafted beside each
    other and each row cost the average. [num_reqs] float64"""
    num_reqs, num_positions = drafts.survival.shape
    target, rows = prices.target, prices.base_rows
    half = max(num_reqs // 2, 1)
    row_ms = (_ms(target, rows + num_reqs) - _ms(target, rows)) / num_reqs
    draft_ms = _ms(prices.draft, half) / half
    tokens_per_ms = prices.base_tokens / prices.base_ms
    advantage = np.empty(num_reqs)
    for request in range(num_reqs):
        value, best = 0.0, -np.inf
        for position in range(num_positions):
            ms = drafts.rows[request, position] * row_ms + draft_ms
            value += drafts.gains[request, position] - tokens_per_ms * ms
            best = max(best, value)
        advantage[request] = best
    return advantage


@njit(inline="always")
def _ms(curve: Curve, rows: float) -> float:
    if rows < 1:
        return 0.0
    below, last = int(rows), curve.by_rows.size - 1
    if below >= last:
        return curve.by_rows[last] + (rows - last) * curve.slope_beyond
    ms = curve.by_rows[below]
    return ms + (curve.by_rows[below + 1] - ms) * (rows - below)


@njit(inline="always")
def _add(
    sums: np.ndarray, drafts: Drafts, request: int, position: int, sign: int
) -> None:
    """One draft more, or less. `sums`: [4, K] over all that are drafted."""
    sums[_GAINED, position] += sign * drafts.gains[request, position]
    sums[_COUNTED, position] += sign
    sums[_VERIFIED, position] += sign * drafts.rows[request, position]
    if position == 0:
        sums[_FIRST_ROWS, 0] += sign * drafts.first_rows[request]


@njit(inline="always")
def _price_depths(sums: np.ndarray, prices: Prices, worth: np.ndarray) -> int:
    """Tokens a millisecond if nobody drafts further than a depth: `worth[depth - 1]`.

    Returns the greatest depth at which anyone drafts.
    """
    tokens, rows = prices.base_tokens, prices.base_rows
    ms = prices.base_ms + prices.speculation_ms - _ms(prices.target, rows)
    for position in range(sums.shape[1]):
        if sums[_COUNTED, position] < 0.5:
            return position
        tokens += sums[_GAINED, position]
        rows += sums[_VERIFIED, position]
        drafting = sums[_COUNTED if position else _FIRST_ROWS, position]
        ms += _ms(prices.draft, max(drafting, 1.0))  # sums may be rounded below
        # Given up copies may be worth a stair, but not more than the step.
        step_ms = max(ms + _ms(prices.target, rows), LEAST_MS)
        worth[position] = tokens / step_ms
    return sums.shape[1]


@_compiled
def _best_prefix(
    drafts: Drafts,
    prices: Prices,
    order: np.ndarray,
    may_draft: np.ndarray,
    lens: np.ndarray,
    least: float,
) -> float:
    """Try the n likeliest drafts of those requests, for every n or every few, cut at
    every depth. Writes `lens` where that is worth more than `least`; returns the
    greater of both.

    `order`: of all drafts, the likeliest first; equals in order of request, then
    position, so that every leading part gives each request a prefix.
    """
    num_positions = drafts.survival.shape[1]
    sums, worth = np.zeros((4, num_positions)), np.empty(num_positions)
    best, best_budget, best_depth = least, 0, 0
    most = np.count_nonzero(drafts.survival > 0)
    stride = (most - 1) // _MOST_BUDGETS + 1
    for budget in range(most):
        request = order[budget] // num_positions
        position = order[budget] % num_positions
        if may_draft[request]:
            _add(sums, drafts, request, position, 1)
        if (budget + 1) % stride == 0 or budget + 1 == most:
            for depth in range(1, _price_depths(sums, prices, worth) + 1):
                if worth[depth - 1] > best:
                    best, best_budget, best_depth = worth[depth - 1], budget + 1, depth
    if best_budget:
        lens[:] = 0
        for draft in order[:best_budget]:
            request = draft // num_positions
            position = draft % num_positions
            if may_draft[request] and position < best_depth:
                lens[request] = position + 1
    return best


@_compiled
def _change_one_by_one(
    drafts: Drafts, prices: Prices, lens: np.ndarray, best: float
) -> float:
    """Give one request after the other its best length beside the others'. Changes
    `lens`, which are worth `best`; returns what they are worth then."""
    num_reqs, num_positions = drafts.survival.shape
    sums, worth = np.zeros((4, num_positions)), np.empty(num_positions)
    for request in range(num_reqs):
        for position in range(lens[request]):
            _add(sums, drafts, request, position, 1)
    without = prices.base_tokens / prices.base_ms
    num_lengths = num_reqs * (num_positions + 1)
    for _ in range(min(_MOST_SWEEPS, _MOST_CHANGES // num_lengths)):
        has_changed = False
        for request in range(num_reqs):
            for position in range(lens[request]):
                _add(sums, drafts, request, position, -1)
            best_len, most = lens[request], 0
            while True:
                depth = _price_depths(sums, prices, worth)
                found = worth[depth - 1] if depth else without
                if found > best * _CERTAINLY_BETTER:
                    best, best_len, has_changed = found, most, True
                if most == num_positions or drafts.survival[request, most] <= 0:
                    break
                _add(sums, drafts, request, most, 1)
                most += 1
            for position in range(best_len, most):
                _add(sums, drafts, request, position, -1)
            lens[request] = best_len
        if not has_changed:
            break
    return best
