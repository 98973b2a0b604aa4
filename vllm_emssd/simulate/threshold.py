"""Draft lengths by thresholds on a *perfectly* calibrated survival.

Its calibration comes from the very trace that is replayed: better than anyone can know.
"""

from __future__ import annotations

import numpy as np

from vllm_emssd.draft_length import DraftLengthPolicy, StepInfo
from vllm_emssd.simulate.traces import Trace

_EDGES = np.array(
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999]
)


class PerfectCalibration:
    """Of a trace, by bins of confidence: how often drafts are accepted once those
    before are, and how likely those behind accepted ones are. [num_bins] both"""

    def __init__(self, trace: Trace) -> None:
        accepted = np.concatenate([r.accepted for r in trace.requests])
        confidence = np.concatenate([r.confidences for r in trace.requests])
        bins, depth = self.bins(confidence), np.arange(trace.header.k)
        is_tested = depth <= accepted[:, None]
        is_accepted = depth < accepted[:, None]
        self.acceptance = _means(is_accepted[is_tested], bins[is_tested])
        behind = self.acceptance[bins[:, 1:]][is_accepted[:, :-1]]
        self.next = _means(behind, bins[:, :-1][is_accepted[:, :-1]])

    @staticmethod
    def bins(confidence: np.ndarray) -> np.ndarray:
        return np.searchsorted(_EDGES, confidence, "right")


def _means(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Where there are none, half."""
    size = len(_EDGES) + 1
    count = np.bincount(bins, minlength=size)
    return (np.bincount(bins, values, size) + 0.5) / (count + 1)


class ThresholdLength(DraftLengthPolicy):
    """Stops where the next draft is too unlikely, and leaves out what has become so.

    Args:
        stop, trim: least survival of a draft that is made, and that is verified.
    """

    needs_confidence = True

    def __init__(
        self, calibration: PerfectCalibration, stop: float, trim: float
    ) -> None:
        self._calibration, self._stop, self._trim = calibration, stop, trim

    def plan(self, step: StepInfo) -> np.ndarray:
        most = step.max_draft_tokens
        self._survival = np.zeros((len(most), 1 + most.max(initial=0)))
        self._survival[:, -1] = 1.0  # before the first
        return most

    def continue_drafting(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        assert confidence is not None
        bins = self._calibration.bins(confidence)
        before = self._survival[req_indices, position - 1]
        survival = before * self._calibration.acceptance[bins]
        self._survival[req_indices, position] = survival
        return np.asarray(survival * self._calibration.next[bins] > self._stop)

    def trim(self, draft_lens: np.ndarray) -> np.ndarray:
        kept: np.ndarray = (self._survival[:, :-1] > self._trim).sum(axis=1)
        return kept
