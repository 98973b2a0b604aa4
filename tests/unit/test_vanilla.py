"""The replay of vanilla's padding, by hand."""

from __future__ import annotations

import pytest

from vllm_emssd.bench.round import RequestStep, Round
from vllm_emssd.bench.vanilla import (
    DecodeCounts,
    Verified,
    VerifiedRequest,
    replay,
    replay_round,
)

# Two requests; the first accepts more and finishes first, and both draft unequally.
LONG = VerifiedRequest(10, [Verified(3, 3), Verified(0, 0)])
SHORT = VerifiedRequest(6, [Verified(1, 0), Verified(2, 1), Verified(1, 1)])


def test_three_rules_by_hand() -> None:
    """Vanilla's aligned lengths before the steps are 10, 14 (4 accepted), 16 (2); own
    lengths of the short one 6, 7, 9. The long one left after two steps."""
    found = replay([[LONG, SHORT]])
    own = [(4, 14), (1, 15), (2, 8), (3, 10), (2, 11)]  # rows, positions read
    padded_inputs = [(4, 14), (3, 17), (4, 10), (3, 10), (2, 11)]
    vanilla = [(4, 14), (4, 14), (3, 17), (3, 17), (2, 18)]
    for counts, steps in (
        (found.unpadded, own),
        (found.padded_inputs, padded_inputs),
        (found.vanilla, vanilla),
    ):
        rows, slots = map(sum, zip(*steps, strict=True))
        assert counts == DecodeCounts(num_rows=rows, num_kv_slots=slots)


def test_equal_requests_need_no_padding() -> None:
    same = [VerifiedRequest(8, [Verified(2, 1), Verified(2, 2)])] * 3
    found = replay([same])
    assert found.vanilla == found.padded_inputs == found.unpadded


def test_impossible_trace() -> None:
    with pytest.raises(ValueError, match="accepts more"):
        VerifiedRequest(8, [Verified(2, 3)])


def test_replay_of_batches_in_turn() -> None:
    """Two batches of two: each is padded by itself, and prompts do not count."""

    def steps(first: int) -> list[list[RequestStep]]:
        long, short = first, first + 1
        return [
            [RequestStep(long, 10, 0, 1), RequestStep(short, 6, 0, 1)],
            [RequestStep(long, 4, 3, 4), RequestStep(short, 2, 1, 1)],
            [RequestStep(long, 1, 0, 1), RequestStep(short, 3, 2, 2)],
            [RequestStep(short, 2, 1, 2)],
        ]

    done = Round(steps=steps(0) + steps(2))
    found = replay_round(done, [10, 6, 10, 6], batch_size=2)
    assert found == replay([[LONG, SHORT], [LONG, SHORT]])
    assert found.vanilla.num_rows == 2 * replay([[LONG, SHORT]]).vanilla.num_rows


# ---------------------------------------------------------------- against the real one
