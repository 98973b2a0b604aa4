"""Draft lengths by thresholds on a *perfectly* calibrated survival.

Its calibration comes from the very trace that is replayed: better than anyone can know.
"""

from __future__ import annotations

import numpy as np

from vllm_emssd.draft_length import DraftLengthPolicy, StepInfo
from vllm_emssd.draft_length.acceptance import Calibration
from vllm_emssd.simulate.traces import Trace

_PRIOR = 0.5  # acceptance where a trace has no drafts of about a confidence


class ThresholdLength(DraftLengthPolicy):
    """Stops where the next draft is too unlikely, and leaves out what has become so.

    Args:
        trace: the one that is replayed.
        stop, trim: least survival of a draft that is made, and that is verified.
    """

    needs_confidence = True

    def __init__(self, trace: Trace, stop: float, trim: float) -> None:
        self._stop, self._trim = stop, trim
        accepted = np.concatenate([r.accepted for r in trace.requests])[:, None]
        confidence = np.concatenate([r.confidences for r in trace.requests])
        depth = np.arange(trace.header.k)
        is_tested, is_accepted = depth <= accepted, depth < accepted
        # How often drafts are accepted, and how likely those behind accepted ones are.
        self._calibration, self._next = Calibration(), Calibration()
        self._calibration.observe(confidence[is_tested], is_accepted[is_tested])
        acceptance = self._calibration.acceptance(confidence, _PRIOR)
        on = is_accepted[:, :-1]
        self._next.observe(confidence[:, :-1][on], acceptance[:, 1:][on])

    def plan(self, step: StepInfo) -> np.ndarray:
        most = step.max_draft_tokens
        self._survival = np.zeros((len(most), 1 + most.max(initial=0)))
        self._survival[:, -1] = 1.0  # before the first
        return most

    def continue_drafting(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        assert confidence is not None
        before = self._survival[req_indices, position - 1]
        survival = before * self._calibration.acceptance(confidence, _PRIOR)
        self._survival[req_indices, position] = survival
        behind = survival * self._next.acceptance(confidence, _PRIOR)
        return np.asarray(behind > self._stop)

    def trim(self, draft_lens: np.ndarray) -> np.ndarray:
        kept: np.ndarray = (self._survival[:, :-1] > self._trim).sum(axis=1)
        return kept
