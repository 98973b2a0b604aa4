"""Draft lengths of a V2 engine changed while it runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import vllm_emssd.integration.cpu.worker  # noqa: F401  before vLLM's V2 runner
from tests.v2.lengths import LENGTHS
from tests.v2.results import results_of
from tests.v2.runs import K
from vllm_emssd.integration.v2.mixed_speculator import MixedSpeculator
from vllm_emssd.integration.v2.runner import UnpadGPUModelRunnerV2


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


def test_says_what_it_needs() -> None:
    """Automatic lengths, and no proposer beside the model."""
    fixed = SimpleNamespace(_automatic=None, speculator=None)
    mixed: Any = object.__new__(MixedSpeculator)
    mixing = SimpleNamespace(_automatic=object(), speculator=mixed)
    for runner in (fixed, mixing):
        runner.num_speculative_steps = K
        with pytest.raises(ValueError, match='"draft_length": "auto"'):
            UnpadGPUModelRunnerV2.fix_draft_length(runner, 1)  # type: ignore[arg-type]
