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

from tests.v2.parameters import V2_CASES

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
            timeout=900,
        )
        return json.loads(path.read_text())


@pytest.mark.parametrize("arrangement", ["all", "beside"])
@pytest.mark.parametrize("case", V2_CASES)
@pytest.mark.parametrize("name", ["fixed", "one draft"])
def test_tokens_are_plain_decoding(name: str, case: str, arrangement: str) -> None:
    plain = results()[f"plain: {case}, {arrangement}"]
    ours = results()[f"{name}: {case}, {arrangement}"]
    assert ours["token_ids"] == plain["token_ids"]
    for seen, expected in zip(ours["logprobs"], plain["logprobs"], strict=True):
        for at_ours, at_plain in zip(seen, expected, strict=True):
            assert dict(map(tuple, at_ours)) == pytest.approx(
                dict(map(tuple, at_plain)), abs=1e-4
            )


def test_drafts_are_accepted() -> None:
    for name in ("fixed", "one draft"):
        accepting = [
            case
            for case in V2_CASES
            if results()[f"{name}: {case}, all"]["num_accepted_tokens"]
        ]
        assert len(accepting) >= len(V2_CASES) - 3


def test_requests_may_limit_their_drafts() -> None:
    assert results()["fixed: no drafts, all"]["num_draft_tokens"] == 0
    assert results()["fixed: no drafts, beside"]["num_draft_tokens"] > 0
