"""How long a policy takes to decide, on the machine that simulates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np

from vllm_emssd.draft_length import DraftLengthPolicy, DraftOpportunity

P = ParamSpec("P")
T = TypeVar("T")


class TimedDraftLength:
    """A policy, and the milliseconds spent in it since the start."""

    def __init__(self, policy: DraftLengthPolicy) -> None:
        self.needs_confidence = policy.needs_confidence
        self.ms = 0.0
        self._policy = policy

    @property
    def feeds_prompts(self) -> bool:
        return self._policy.feeds_prompts

    def rests(self, num_tokens_anyway: float) -> bool:
        return self._timed(self._policy.rests, num_tokens_anyway)

    def begin(self, step: DraftOpportunity) -> np.ndarray:
        return self._timed(self._policy.begin, step)

    def go_on(
        self, req_indices: np.ndarray, confidence: np.ndarray | None, position: int
    ) -> np.ndarray:
        return self._timed(self._policy.go_on, req_indices, confidence, position)

    def finish(self, draft_lens: np.ndarray) -> np.ndarray:
        return self._timed(self._policy.finish, draft_lens)

    def choose(self, step: DraftOpportunity, confidence: np.ndarray) -> np.ndarray:
        return self._timed(self._policy.choose, step, confidence)

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        self._timed(self._policy.observe, req_id, num_draft_tokens, num_accepted_tokens)

    def observe_others(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        self._timed(
            self._policy.observe_others, req_id, num_draft_tokens, num_accepted_tokens
        )

    def release(self, req_id: str) -> None:
        self._timed(self._policy.release, req_id)

    def _timed(self, decide: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        start = time.perf_counter()
        decided = decide(*args, **kwargs)
        self.ms += (time.perf_counter() - start) * 1e3
        return decided
