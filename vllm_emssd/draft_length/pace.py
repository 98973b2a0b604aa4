"""What a token of each request is worth, by what its request's tokens cost.

A request holds its place in every step until its last token. A token more now saves,
later, the time that the request takes for one: of its steps, their rows and drafts, by
the tokens they give (the relative value of a renewal process). Counting all tokens
alike would hurry the fast requests and leave the slow ones to fill the batch; counting
steps alone would forget that a fast request's steps have more rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_FORGET_ALL = 0.998  # weight kept by all earlier request-steps at each new one
_FORGET_OWN = 0.95
_PRIOR_STEPS = 2.0  # request-steps before a request's own pace counts as much as all


class Pace:
    """Steps, drafts and tokens: of all requests, and of each."""

    def __init__(self) -> None:
        self._all = np.zeros(3)  # steps, drafts, tokens
        self._own: dict[str, np.ndarray] = {}

    def observe(self, req_id: str, num_drafts: int, num_tokens: int) -> None:
        """A request got `num_tokens` in a step that verified `num_drafts` for it."""
        seen = np.array([1.0, num_drafts, num_tokens])
        self._all = _FORGET_ALL * self._all + seen
        self._own[req_id] = _FORGET_OWN * self._own.get(req_id, 0.0) + seen

    def worth(
        self, req_ids: Sequence[str], step_ms: float, draft_ms: float
    ) -> np.ndarray:
        """Of a token of each request, in average tokens. [num_reqs] float64

        Args:
            step_ms: of a step without drafts, a request's share.
            draft_ms: of a draft more, made and verified.
        """
        num_steps = self._all[0]
        if not num_steps or not req_ids:
            return np.ones(len(req_ids))
        prior = self._all * (_PRIOR_STEPS / num_steps)
        own = np.array([self._own.get(r, _UNSEEN) for r in req_ids]) + prior
        prices = np.array([step_ms, draft_ms, 0.0])
        average = self._all @ prices / self._all[2]
        return np.asarray(own @ prices / own[:, 2] / max(average, _LEAST_MS))

    def release(self, req_id: str) -> None:
        self._own.pop(req_id, None)


_UNSEEN = np.zeros(3)
_LEAST_MS = 1e-9
