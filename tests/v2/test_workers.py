"""A head on the V2 runner is split over workers, as the target is."""

from __future__ import annotations

import pytest

from tests.v2.results import results_of


@pytest.mark.slow
def test_two_workers_give_the_targets_tokens_and_count_alike() -> None:
    seen = results_of("tests.v2.workers")
    assert seen["head"]["token_ids"] == seen["plain"]["token_ids"]
    first, second = seen["head"]["counts"]
    assert first == second
    assert first["num_accepted_tokens"] > 20
