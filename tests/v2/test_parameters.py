"""The V2 runner samples as plain decoding does, whatever a request asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.lossless.test_greedy import CASES, MUST_ACCEPT, PATHS

REPO = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@cache
def results() -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        subprocess.run(
            [sys.executable, "-m", "tests.v2.parameters", str(path)],
            cwd=REPO,
            env=os.environ | {"PYTHONPATH": str(REPO)},
            check=True,
            timeout=1800,
        )
        return json.loads(path.read_text())


OURS = ("fixed", "one draft", "async", "auto", "copying")


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
