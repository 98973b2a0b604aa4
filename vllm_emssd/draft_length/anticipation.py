"""What drafting will tell: a draft is made first, and verified only if it looks good.

Before drafting, only averages are known. The drafter's confidence then says which
drafts are better than that and which are worse, and the worse ones cost no row of the
target. So to draft is worth more than its average: how much follows from how far
confidence moved the estimates lately.
"""

from __future__ import annotations

import numpy as np

_REMEMBERED = 64  # requests' drafts, the latest
_NUM_PARTS = 8  # of their distribution, the mean of each standing for it
_LEAST = 16  # remembered, before any of it is believed


class Anticipation:
    """Survival once confidence is known, over survival expected before it.

    Args:
        num_speculative_tokens: K, the most drafts of a request.
    """

    def __init__(self, num_speculative_tokens: int) -> None:
        self._ratios = np.ones((_REMEMBERED, num_speculative_tokens))
        self._num_seen = 0
        self._parts: np.ndarray | None = None  # [_NUM_PARTS, 1, K], until more is seen

    def observe(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Some requests drafted.

        Args:
            expected: [num_reqs, K] > 0, survival before drafting.
            found: [num_reqs, K] with confidences known; 0 where no draft was made, then
                taken to be as much better or worse than expected as the last one made.
        """
        made = np.maximum(np.count_nonzero(found, axis=1), 1)
        last = np.minimum(np.arange(found.shape[1]), made[:, None] - 1)
        ratios = np.take_along_axis(found / expected, last, axis=1)
        ratios = ratios[-_REMEMBERED:]
        places = (self._num_seen + np.arange(len(ratios))) % _REMEMBERED
        self._ratios[places] = ratios
        self._num_seen += len(ratios)
        self._parts = None

    def gains_and_rows(
        self, gains: np.ndarray, least_gain: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of drafts verified if their gain turns out to be at least `least_gain`.

        Args:
            gains: [num_reqs, K] expected on average, non-growing along a row.

        Returns: [num_reqs, K] gains, non-growing too, and [num_reqs, K] the target's
        rows, at most 1 each.
        """
        if self._num_seen < _LEAST:
            return gains, (gains > 0).astype(float)
        outcomes = gains * self._distribution
        is_verified = outcomes >= max(least_gain, 1e-9)
        gained = (outcomes * is_verified).mean(axis=0)
        return np.minimum.accumulate(gained, axis=1), is_verified.mean(axis=0)

    @property
    def _distribution(self) -> np.ndarray:
        if self._parts is None:
            known = np.sort(self._ratios[: self._num_seen], axis=0)
            bounds = np.arange(_NUM_PARTS + 1) * len(known) // _NUM_PARTS
            sums = np.add.reduceat(known, bounds[:-1])
            means = sums / np.diff(bounds)[:, None]
            self._parts = (means / means.mean(axis=0))[:, None]
        return self._parts
