"""How likely a draft is accepted, learned from those that were verified.

Before drafting, the acceptance of drafts by their depth is known. While drafting, so is
the drafter's *confidence* (its highest probability where the draft was made), and how
often drafts of about that confidence were accepted. Older drafts count less. Estimates
start high, since nothing is learned of what is never tried.
"""

from __future__ import annotations

import numpy as np

_EDGES = np.array(
    [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
)  # of confidence bins
_PRIOR_TESTS = 4.0  # verified drafts that a prior guess counts as
_FIRST_GUESS = 0.9
_DEPTH_KEEP = 0.998  # weight kept by earlier drafts at each new first draft
_CONFIDENCE_KEEP = 0.9995  # at each new draft of any confidence
_MOST_ACCEPTANCE = 0.995
_DOUBTED_TESTS = 8.0  # drafts that an estimate counts as after a long time without


class Calibration:
    """Share of the drafts that were accepted, by bins of their confidence, or of
    something else with its own edges."""

    def __init__(self, edges: np.ndarray = _EDGES) -> None:
        self._edges = edges
        self.counts = np.zeros((2, len(edges) + 1))  # [accepted | tested, bin]

    def acceptance(
        self, confidence: np.ndarray, prior: float | np.ndarray
    ) -> np.ndarray:
        """Chance that drafts are accepted once all before them are, `prior` where none
        of their confidence was verified. Shape kept."""
        bins = np.searchsorted(self._edges, confidence, "right")
        accepted, tested = self.counts[:, bins]
        calibrated = (accepted + _PRIOR_TESTS * prior) / (tested + _PRIOR_TESTS)
        return np.minimum(calibrated, _MOST_ACCEPTANCE)

    def observe(
        self,
        confidence: np.ndarray,
        is_accepted: np.ndarray,
        keep: float | None = None,
    ) -> None:
        """Both [num_drafts]: those accepted, and a request's first that was not.
        `keep`: the weight of what was seen before."""
        bins = np.searchsorted(self._edges, confidence, "right")
        size = self.counts.shape[1]
        self.counts *= _CONFIDENCE_KEEP**bins.size if keep is None else keep
        self.counts[0] += np.bincount(bins, weights=is_accepted, minlength=size)
        self.counts[1] += np.bincount(bins, minlength=size)

    def doubt(self) -> None:
        """Make the next observations count for more."""
        self.counts *= np.minimum(1, _DOUBTED_TESTS / np.maximum(self.counts[1], 1))


class AcceptanceEstimator:
    """Acceptance by depth and by confidence.

    Args:
        num_speculative_tokens: K, the most drafts of a request.
    """

    def __init__(self, num_speculative_tokens: int) -> None:
        self.num_speculative_tokens = num_speculative_tokens
        self._by_confidence = Calibration()
        self._by_depth = Calibration(np.arange(1, num_speculative_tokens))
        self._by_depth.counts[:, 0] = _FIRST_GUESS * _PRIOR_TESTS, _PRIOR_TESTS
        self._update_estimates()

    def survival(
        self, confidence: np.ndarray, survival_before: np.ndarray | float
    ) -> np.ndarray:
        """Chance that drafts made with this confidence and all before them are
        accepted. All [num_drafts]."""
        return survival_before * self._by_confidence.acceptance(confidence, self._mean)

    def hoped_for(self) -> np.ndarray:
        """Acceptance by depth, a standard error above the estimate. [K]"""
        variance = self.by_depth * (1 - self.by_depth)
        error = np.sqrt(variance / (self._by_depth.counts[1] + _PRIOR_TESTS))
        return np.minimum(self.by_depth + error, _MOST_ACCEPTANCE)

    def observe(
        self, confidence: np.ndarray, num_verified: np.ndarray, num_accepted: np.ndarray
    ) -> None:
        """The target verified the first of each request's drafts, accepting a prefix.

        Args:
            confidence: [num_reqs, K] of all drafts made, NaN where nobody asked for it.
            num_verified, num_accepted: [num_reqs]
        """
        depth = np.broadcast_to(np.arange(confidence.shape[1]), confidence.shape)
        is_verified = depth < num_verified[:, None]
        is_accepted = depth < num_accepted[:, None]
        is_known = ~np.isnan(confidence)
        on = (is_verified | is_known) & (depth <= num_accepted[:, None])
        # A draft that was made, would have been reached and was not verified: as its
        # confidence says. Else what is always trimmed would be drafted for ever.
        guess = self._by_confidence.acceptance(confidence, self._mean)
        outcome = np.where(is_verified, is_accepted, guess)
        keep = _DEPTH_KEEP ** int(on[:, 0].sum())
        self._by_depth.observe(depth[on], outcome[on], keep)
        on &= is_verified & is_known
        self._by_confidence.observe(confidence[on], is_accepted[on])
        self._update_estimates()

    def doubt(self) -> None:
        """Nothing was drafted for long."""
        self._by_depth.doubt()
        self._by_confidence.doubt()
        self._update_estimates()

    def _update_estimates(self) -> None:
        """A depth that little is known of is taken to be like the one before."""
        accepted, tested = self._by_depth.counts.tolist()
        by_depth = [accepted[0] / tested[0]]
        for a, t in zip(accepted[1:], tested[1:], strict=True):
            by_depth.append((a + _PRIOR_TESTS * by_depth[-1]) / (t + _PRIOR_TESTS))
        self.by_depth = np.array(by_depth)  # [K]
        self._mean = sum(accepted) / sum(tested)
