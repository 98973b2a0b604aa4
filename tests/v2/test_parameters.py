"""The V2 runner samples as plain decoding does, whatever a request asks for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lossless.test_greedy import CASES, MUST_ACCEPT, PATHS
from tests.v2.results import results_of

pytestmark = pytest.mark.slow


def results() -> dict[str, Any]:
    return results_of("tests.v2.parameters", timeout=1800)


OURS = ("fixed", "one draft", "async", "auto", "eagle3", "copying")


@pytest.mark.parametrize("arrangement", ["all", "alone", "beside"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OURS)
def test_tokens_are_plain_decoding(name: str, case: str, arrangement: str) -> None:
    plain = results()[f"plain: {case}, {arrangement}"]
    ours = results()[f"{name}: {case}, {arrangement}"]
    for field in ("token_ids", "texts", "finish_reasons"):
        assert ours[field] == plain[field], field
    for seen, expected in zip(ours["logprobs"], plain["logprobs"], strict=True):
        for at_ours, at_plain in zip(seen, expected, strict=True):
            assert dict(map(tuple, at_ours)) == pytest.approx(
                dict(map(tuple, at_plain)), abs=1e-4
            )


@pytest.mark.parametrize("case", MUST_ACCEPT)
def test_each_kind_of_row_was_sampled(case: str) -> None:
    paths = set()
    for name in OURS:
        for arrangement in ("all", "alone", "beside"):
            paths |= set(results()[f"{name}: {case}, {arrangement}"]["paths"])
    assert paths == PATHS


@pytest.mark.parametrize("name", OURS)
def test_drafts_are_accepted(name: str) -> None:
    accepting = [
        case
        for case in CASES
        if results()[f"{name}: {case}, all"]["num_accepted_tokens"]
    ]
    assert set(MUST_ACCEPT) <= set(accepting)


@pytest.mark.parametrize("name", OURS)
def test_requests_may_limit_their_drafts(name: str) -> None:
    assert results()[f"{name}: no drafts, all"]["num_draft_tokens"] == 0
    assert results()[f"{name}: no drafts, beside"]["num_draft_tokens"] > 0
