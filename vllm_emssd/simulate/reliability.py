"""Automatic lengths that also count how reliable their predictions were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_emssd.draft_length import AutoDraftLength

AT_TRIM, AT_STOP = 10, 11  # the lines after the ten deciles


class CountedDraftLength(AutoDraftLength):
    """`reliability` holds sums over the drafts made, verified or not: by the decile of
    their predicted survival, and in two more lines over *marginal* ones, within a
    quarter: those that seemed to bring what verifying them costs, and those that, right
    before they were made, what making and verifying them costs.
    [number | predicted | accepted | cost in tokens, line]

    Args:
        num_accepted: of a request's drafts, were all that are made verified.
    """

    def __init__(
        self, *args: Any, num_accepted: Callable[[str], int], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.reliability = np.zeros((4, 12))
        self._num_accepted = num_accepted

    def trim(self, draft_lens: np.ndarray) -> np.ndarray:
        if self.needs_confidence and draft_lens.any():
            self._count(draft_lens)
        return super().trim(draft_lens)

    def _count(self, draft_lens: np.ndarray) -> None:
        survival, depth = self._survival, np.arange(self._survival.shape[1])
        is_made = depth < draft_lens[:, None]
        accepted = np.array(list(map(self._num_accepted, self._req_ids)))
        is_accepted = depth < accepted[:, None]
        decile = np.minimum((survival * 10).astype(np.int64), 9)
        cost = self._verify_cost
        self._add(decile, is_made, survival, is_accepted, cost)
        at_trim = is_made & _is_about(survival, cost)
        self._add(AT_TRIM, at_trim, survival, is_accepted, cost)
        before, cost = survival[:, :-1] * self.acceptance.by_depth[1:], self._draft_cost
        at_stop = is_made[:, 1:] & _is_about(before, cost)
        self._add(AT_STOP, at_stop, before, is_accepted[:, 1:], cost)

    def _add(
        self,
        line: np.ndarray | int,
        on: np.ndarray,
        predicted: np.ndarray,
        is_accepted: np.ndarray,
        cost: float,
    ) -> None:
        """Drafts `on` to their lines. [num_reqs, depth] each"""
        lines = np.broadcast_to(line, on.shape)[on]
        added: tuple[Any, ...] = 1.0, predicted, is_accepted, cost
        for sums, values in zip(self.reliability, added, strict=True):
            weights = np.broadcast_to(values, on.shape)[on]
            sums += np.bincount(lines, weights, minlength=len(sums))


def _is_about(predicted: np.ndarray, cost: float) -> np.ndarray:
    return (predicted <= 1.25 * cost) & (cost <= 1.25 * predicted)
