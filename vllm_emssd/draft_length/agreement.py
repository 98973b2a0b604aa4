"""Ranks that decide alike, or stop.

All ranks of an engine run the same policy on the same prices and the same token
history, so they decide alike. A rank that did not would feed other rows to the drafter,
and the next collective of the models would hang, or add up what does not belong
together. So decisions are compared before they are acted on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from vllm_emssd.draft_length.policy import DraftLengthPolicy, DraftOpportunity


class AgreedDraftLength:
    """A policy whose decisions are compared with those of the other ranks.

    Args:
        policy: what decides.
        compare: called with a fingerprint of all that was decided and observed so far;
            raises, on every rank, where the ranks' fingerprints differ.
    """

    def __init__(
        self, policy: DraftLengthPolicy, compare: Callable[[int], None]
    ) -> None:
        self.needs_confidence = policy.needs_confidence
        self._policy = policy
        self._compare = compare
        self._fingerprint = 0

    @property
    def feeds_prompts(self) -> bool:
        return self._policy.feeds_prompts

    def rests(self, num_tokens_anyway: float) -> bool:
        return False  # every step's decision is compared

    def begin(self, step: DraftOpportunity) -> np.ndarray:
        draft_lens = self._policy.begin(step)
        self._take_in(step.missing_rows)
        self._take_in(np.array([self.feeds_prompts]))
        return self._agreed(draft_lens)

    def go_on(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        goes_on = self._policy.go_on(req_indices, confidence, position)
        # Without confidence nothing has come up that `begin` did not know.
        return self._agreed(goes_on) if self.needs_confidence else goes_on

    def finish(self, draft_lens: np.ndarray) -> np.ndarray:
        kept = self._policy.finish(draft_lens)
        self._take_in(kept)  # compared in the next step: the first rank's are verified
        return kept

    def choose(self, step: DraftOpportunity, confidence: np.ndarray) -> np.ndarray:
        return self._agreed(self._policy.choose(step, confidence))

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        self._take_in(np.array([num_draft_tokens, num_accepted_tokens]))
        self._policy.observe(req_id, num_draft_tokens, num_accepted_tokens)

    def observe_others(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        self._take_in(np.array([num_draft_tokens, num_accepted_tokens]))
        self._policy.observe_others(req_id, num_draft_tokens, num_accepted_tokens)

    def release(self, req_id: str) -> None:
        self._policy.release(req_id)

    def _take_in(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=np.int64)
        self._fingerprint = zlib.crc32(data.tobytes(), self._fingerprint)

    def _agreed(self, decision: np.ndarray) -> np.ndarray:
        self._take_in(decision)
        self._compare(self._fingerprint)
        return decision
