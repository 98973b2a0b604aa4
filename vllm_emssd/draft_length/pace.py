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
_LEAST_MS = 1e-9

_Sums = tuple[float, float, float, float]  # steps, drafts, copies, tokens
_UNSEEN: _Sums = (0.0, 0.0, 0.0, 0.0)


class Pace:
    """Steps, drafts, copies and tokens: of all requests, and of each."""

    def __init__(self) -> None:
        self._all = _UNSEEN
        self._own: dict[str, _Sums] = {}

    def observe(
        self, req_id: str, num_drafts: int, num_tokens: int, are_copies: bool = False
    ) -> None:
        """A request got `num_tokens` in a step that verified `num_drafts` for it."""
        drafts_and_copies = (0, num_drafts) if are_copies else (num_drafts, 0)
        news: _Sums = (1.0, *drafts_and_copies, num_tokens)
        own = self._own.get(req_id, _UNSEEN)
        self._own[req_id] = _added(own, _FORGET_OWN, news)
        self._all = _added(self._all, _FORGET_ALL, news)

    def worth(
        self, req_ids: Sequence[str], step_ms: float, row_ms: float, draft_ms: float
    ) -> np.ndarray:
        """Of a token of each request, in average tokens. [num_reqs] float64

        Args:
            step_ms: of a step without drafts, a request's share.
            row_ms: of verifying a draft more.
            draft_ms: of making it, unless it is a copy.
        """
        everyone = np.array(self._all)
        if not everyone[0] or not req_ids:
            return np.ones(len(req_ids))
        prior = everyone * (_PRIOR_STEPS / everyone[0])
        own = np.array([self._own.get(r, _UNSEEN) for r in req_ids]) + prior
        prices = np.array([step_ms, row_ms + draft_ms, row_ms, 0.0])
        average = everyone @ prices / everyone[-1]
        return np.asarray(own @ prices / own[:, -1] / max(average, _LEAST_MS))

    def release(self, req_id: str) -> None:
        self._own.pop(req_id, None)


def _added(sums: _Sums, kept: float, news: _Sums) -> _Sums:
    steps, drafts, copies, tokens = sums
    return (
        kept * steps + news[0],
        kept * drafts + news[1],
        kept * copies + news[2],
        kept * tokens + news[3],
    )
