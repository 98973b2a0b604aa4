"""The V2 runner verifies each row with its request's LoRA adapter."""

from __future__ import annotations

import pytest

from tests.v2.results import results_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["draft_model", "eagle3", "llma"])
def test_tokens_are_plain_decoding(name: str) -> None:
    seen = results_of("tests.v2.lora")
    assert seen[name]["token_ids"] == seen["plain"]["token_ids"]
    assert seen[name]["num_accepted_tokens"] > 0
