"""A request's own limit of drafts, checked in the front end and kept in the worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_emssd.integration.request_options import RequestLimits, check_request_limit

WRONG = [-1, True, 1.0, "2", None, [1]]


def params_of(limit: Any) -> SamplingParams:
    return SamplingParams(extra_args={"emssd_max_draft_tokens": limit})


@pytest.mark.parametrize("limit", [0, 1, 2**40])
def test_accepted(limit: int) -> None:
    check_request_limit(params_of(limit))
    check_request_limit(SamplingParams())


@pytest.mark.parametrize("limit", WRONG)
def test_refused(limit: Any) -> None:
    with pytest.raises(VLLMValidationError, match="emssd_max_draft_tokens must be an"):
        check_request_limit(params_of(limit))


def new_request(req_id: str, params: SamplingParams) -> Any:
    return SimpleNamespace(req_id=req_id, sampling_params=params)


def test_the_next_input_of_a_session_has_its_own() -> None:
    limits, most = RequestLimits(), np.full(1, 5)
    limits.admit([new_request("session", params_of(2))])
    limits.admit([new_request("session", SamplingParams())])
    limits.apply(most, ["session"])
    assert most.tolist() == [5]


def test_lowers_only_the_requests_that_have_one() -> None:
    limits = RequestLimits()
    given = {"a": 2, "b": 0, "c": 2**40, "odd": "x", "gone": 1}
    limits.admit([new_request(i, params_of(limit)) for i, limit in given.items()])
    limits.release(["gone", "never came"])
    most, req_ids = np.full(6, 5), ["free", "a", "b", "c", "odd", "gone"]
    limits.apply(most, req_ids)
    assert most.tolist() == [5, 2, 0, 5, 5, 5]
    limits.release(["a", "b", "c"])
    most[:] = 5
    limits.apply(most, req_ids)
    assert most.tolist() == [5] * 6
