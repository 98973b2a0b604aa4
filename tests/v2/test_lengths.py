"""Draft lengths of a V2 engine changed while it runs."""

from __future__ import annotations

import pytest

from tests.v2.lengths import LENGTHS
from tests.v2.results import results_of
from tests.v2.runs import K


@pytest.mark.slow
def test_lengths_change_and_tokens_do_not() -> None:
    seen = results_of("tests.v2.lengths")
    most = {
        length: max(n for step in seen[str(length)]["lengths"] for n in step)
        for length in LENGTHS
    }
    assert most == {1: 1, 0: 0, K: K, None: K}
    assert seen["0"]["draft_rows"] == 0 < seen["1"]["draft_rows"]
    assert len({str(seen[str(length)]["token_ids"]) for length in LENGTHS}) == 1
    assert f"give 0 to {K}" in seen["error"]
