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
MAX_ACCEPTANCE = 0.995
_DOUBTED_TESTS = 8.0  # drafts that an estimate counts as after a long time without


class Calibration:
    """Share of the drafts of about a confidence that were accepted."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, len(_EDGES) + 1))  # [accepted | tested, bin]

    def acceptance(
        self, confidence: np.ndarray, prior: float | np.ndarray
    ) -> np.ndarray:
        """Chance that drafts are accepted once all before them are, `prior` where none
        of their confidence was verified. Shape kept."""
        accepted, tested = self._counts[:, np.searchsorted(_EDGES, confidence, "right")]
        calibrated = (accepted + _PRIOR_TESTS * prior) / (tested + _PRIOR_TESTS)
        return np.minimum(calibrated, MAX_ACCEPTANCE)

    def observe(self, confidence: np.ndarray, is_accepted: np.ndarray) -> None:
        """Both [num_drafts]: those accepted, and a request's first that was not."""
        bins = np.searchsorted(_EDGES, confidence, "right")
        size = self._counts.shape[1]
        self._counts *= _CONFIDENCE_KEEP**bins.size
        self._counts[0] += np.bincount(bins, weights=is_accepted, minlength=size)
        self._counts[1] += np.bincount(bins, minlength=size)

    def doubt(self) -> None:
        """Make the next observations count for more."""
        self._counts *= np.minimum(1, _DOUBTED_TESTS / np.maximum(self._counts[1], 1))


class AcceptanceEstimator:
    """Acceptance by depth and by confidence.

    Args:
        num_speculative_tokens: K, the most drafts of a request.
    """

    def __init__(self, num_speculative_tokens: int) -> None:
        self.num_speculative_tokens = num_speculative_tokens
        self._calibration = Calibration()
        self._depth_counts = np.zeros((2, num_speculative_tokens))
        self._depth_counts[:, 0] = _FIRST_GUESS * _PRIOR_TESTS, _PRIOR_TESTS
        self._observed: list[tuple[np.ndarray, int, int]] = []
        self._update_estimates()

    def survival(
        self, confidence: np.ndarray, survival_before: np.ndarray | float
    ) -> np.ndarray:
        """Chance that drafts made with this confidence and all before them are
        accepted. All [num_drafts]."""
        return survival_before * self._calibration.acceptance(confidence, self._mean)

    def hoped_for(self) -> np.ndarray:
        """Acceptance by depth, a standard error above the estimate. [K]"""
        variance = self.by_depth * (1 - self.by_depth)
        error = np.sqrt(variance / (self._depth_counts[1] + _PRIOR_TESTS))
        return np.minimum(self.by_depth + error, MAX_ACCEPTANCE)

    def observe(
        self, confidence: np.ndarray | None, num_verified: int, num_accepted: int
    ) -> None:
        """The target verified the first of a request's drafts and accepted a prefix.
        Estimates change with the next `update`.

        Args:
            confidence: [num_made] of all its drafts; None where none was asked for.
        """
        if confidence is None:
            confidence = np.full(num_verified, np.nan)
        if confidence.size:
            self._observed.append((confidence, num_verified, num_accepted))

    def observe_step(self, num_verified: np.ndarray, num_accepted: np.ndarray) -> None:
        """The same of many requests, of whose drafts no confidence was asked for, and
        counted at once. Both [num_reqs] int64."""
        depth = np.arange(self.num_speculative_tokens)
        is_accepted = depth < num_accepted[:, None]
        is_tested = depth < np.minimum(num_verified, num_accepted + 1)[:, None]
        self._depth_counts *= _DEPTH_KEEP ** int(is_tested[:, 0].sum())
        self._depth_counts[0] += (is_accepted & is_tested).sum(axis=0)
        self._depth_counts[1] += is_tested.sum(axis=0)
        self._update_estimates()

    def update(self) -> None:
        """Count all that was observed since the last call."""
        if not self._observed:
            return
        made, *verified = zip(*self._observed, strict=True)
        self._observed = []
        num_verified, num_accepted = np.array(verified)[:, :, None]
        counts = np.array([confidence.size for confidence in made])[:, None]
        depth = np.arange(counts.max())
        is_made = depth < counts
        confidence = np.full(is_made.shape, np.nan)
        confidence[is_made] = np.concatenate(made)
        is_verified, is_accepted = depth < num_verified, depth < num_accepted
        is_tested = is_made & (depth <= num_accepted)
        # A draft that was made, would have been reached and was not verified: as its
        # confidence says. Else what is always trimmed would be drafted for ever.
        guess = self._calibration.acceptance(confidence, self._mean)
        outcome = np.where(is_verified, is_accepted, guess)
        self._depth_counts *= _DEPTH_KEEP ** int(is_tested[:, :1].sum())
        self._depth_counts[0, : depth.size] += (outcome * is_tested).sum(axis=0)
        self._depth_counts[1, : depth.size] += is_tested.sum(axis=0)
        on = is_tested & is_verified & ~np.isnan(confidence)
        self._calibration.observe(confidence[on], is_accepted[on])
        self._update_estimates()

    def doubt(self) -> None:
        """Nothing was drafted for long: make the next observations count for more."""
        tested = self._depth_counts[1, 0]
        self._depth_counts *= min(1.0, _DOUBTED_TESTS / max(tested, 1.0))
        self._calibration.doubt()
        self._update_estimates()

    def _update_estimates(self) -> None:
        """A depth that little is known of is taken to be like the one before."""
        estimates: list[float] = []
        for accepted, tested in self._depth_counts.T.tolist():
            prior = _PRIOR_TESTS if estimates else 0.0
            like = estimates[-1] if estimates else 0.0
            estimates.append((accepted + prior * like) / (tested + prior))
        self.by_depth = np.array(estimates)  # [K]
        accepted, tested = self._depth_counts.sum(axis=1)
        self._mean = float(accepted / tested)
