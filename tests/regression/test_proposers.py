"""Engines with the proposers of CONTRIBUTING.md and of installed packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import EngineConfig, greedy, running, stats, stop_counting_others
from tests.proposer_example import example_name, installed_example
from tests.regression.runs import batch_prompts, plain_tokens
from vllm_emssd.config import plugin_proposers

BATCH = 8


@pytest.fixture(autouse=True)
def _example(tmp_path: Path) -> Iterator[None]:
    with installed_example(tmp_path):
        yield


@pytest.mark.parametrize(
    "name", list(dict.fromkeys([example_name(), *plugin_proposers()]))
)
def test_tokens_are_plain_decoding_and_drafts_are_accepted(name: str) -> None:
    expected = plain_tokens(BATCH)
    stop_counting_others()
    config = EngineConfig({"method": "emssd", "proposer": name})
    with running(config) as llm:
        assert greedy(llm, batch_prompts(BATCH)) == expected
        counts = stats(llm)
    assert counts["num_draft_tokens"] > counts["num_accepted_tokens"] > 0
