"""How fast each request gets its tokens, and what one of them is therefore worth.

A request holds its place in every step until its last token. So a token for a slow one
brings the next request in sooner than a token for a fast one: with r tokens a step, of
an average of R, it is worth R / r average tokens (the relative value of a renewal
process). Counting all tokens alike would hurry the fast ones and leave the slow ones
to fill the batch. As a few steps tell a pace badly, the square root of that is taken,
which did best in simulation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_FORGET_ALL = 0.998  # weight kept by all earlier request-steps at each new one
_FORGET_OWN = 0.95
_PRIOR_STEPS = 2.0  # request-steps before a request's own pace counts as much as all


class Pace:
    """Tokens a step: of all requests, and of each."""

    def __init__(self) -> None:
        self._tokens = self._steps = 0.0
        self._own: dict[str, tuple[float, float]] = {}  # tokens, steps

    def observe(self, req_id: str, num_tokens: int) -> None:
        """A request got `num_tokens` in a step."""
        self._tokens = _FORGET_ALL * self._tokens + num_tokens
        self._steps = _FORGET_ALL * self._steps + 1.0
        tokens, steps = self._own.get(req_id, (0.0, 0.0))
        self._own[req_id] = (
            _FORGET_OWN * tokens + num_tokens,
            _FORGET_OWN * steps + 1.0,
        )

    def worth(self, req_ids: Sequence[str]) -> np.ndarray:
        """Of a token of each request, in average tokens. [num_reqs] float64"""
        if not self._steps:
            return np.ones(len(req_ids))
        unseen = (0.0, 0.0)
        tokens, steps = np.array([self._own.get(r, unseen) for r in req_ids]).T
        average = self._tokens / self._steps
        own = (tokens + _PRIOR_STEPS * average) / (steps + _PRIOR_STEPS)
        return np.asarray(np.sqrt(average / own))

    def release(self, req_id: str) -> None:
        self._own.pop(req_id, None)
