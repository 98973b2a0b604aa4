"""A request's own limit of drafts: `emssd_max_draft_tokens` in
`SamplingParams.extra_args` (over HTTP: `vllm_xargs`); 0 is no speculation for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

MAX_DRAFT_TOKENS_KEY = "emssd_max_draft_tokens"


def check_request_limit(params: SamplingParams) -> None:
    """In the front end. Raises VLLMValidationError (HTTP 400) naming the fix."""
    limit = (params.extra_args or {}).get(MAX_DRAFT_TOKENS_KEY, 0)
    if not _is_limit(limit):
        raise VLLMValidationError(
            f"{MAX_DRAFT_TOKENS_KEY} must be an integer, at least 0 (no drafts), got "
            f"{limit!r}.",
            parameter=MAX_DRAFT_TOKENS_KEY,
        )


def _is_limit(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


class RequestLimits:
    """In the worker: the limits of the requests that have one."""

    def __init__(self) -> None:
        self._limits: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._limits)

    def admit(self, new_requests: Iterable[NewRequestData]) -> None:
        for new in new_requests:
            extra_args = new.sampling_params and new.sampling_params.extra_args
            limit = (extra_args or {}).get(MAX_DRAFT_TOKENS_KEY)
            if _is_limit(limit):  # else it did not go through the front end's check
                self._limits[new.req_id] = limit

    def release(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._limits.pop(req_id, None)

    def apply(self, max_draft_tokens: np.ndarray, rows: Mapping[str, int]) -> None:
        """Lower `max_draft_tokens` [num_reqs] in place; `rows`: of each request."""
        for req_id, limit in self._limits.items():
            row = rows.get(req_id)
            if row is not None:
                max_draft_tokens[row] = min(max_draft_tokens[row], limit)
