"""On the V2 runner a head is split over workers as the target is, and sampling too."""

from __future__ import annotations

import pytest

from tests.v2.results import results_of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["head", "sharded"])
def test_two_workers_give_the_targets_tokens_and_count_alike(name: str) -> None:
    seen, plain = (results_of("tests.v2.workers")[n] for n in (name, "plain"))
    assert seen["token_ids"] == plain["token_ids"]
    for ours, wanted in zip(seen["logprobs"], plain["logprobs"], strict=True):
        assert ours == pytest.approx(wanted, abs=1e-4)
    first, second = seen["counts"]
    assert first == second
    assert first["num_accepted_tokens"] > 20
