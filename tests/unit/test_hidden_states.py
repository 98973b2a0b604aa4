"""Hidden states that wait for an EAGLE head: where there is no room for all of them.

That they come back by request and position is seen in `test_eagle.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from vllm_emssd.proposers.hidden_states import HiddenStates

Spans = Mapping[str, tuple[int, int]]  # first position and number, by request


def states_of(numbers: Mapping[str, int], spans: Spans) -> list[torch.Tensor]:
    """Of two layers; a state tells its request and position."""
    rows = [
        [numbers[req_id], start + i]
        for req_id, (start, length) in spans.items()
        for i in range(length)
    ]
    both = torch.tensor(rows, dtype=torch.float32)
    return [both[:, :1], both[:, 1:]]


def keep(kept: HiddenStates, numbers: Mapping[str, int], spans: Spans) -> None:
    starts, lens = np.array(list(spans.values()), dtype=np.int64).T
    first_rows = np.cumsum(lens) - lens
    kept.keep(list(spans), starts, lens, first_rows, states_of(numbers, spans))


def assert_kept(
    kept: HiddenStates, numbers: Mapping[str, int], req_id: str, start: int, end: int
) -> None:
    assert kept.first(req_id) == start
    states = kept.of([req_id], np.array([start]), np.array([end]))
    assert states.tolist() == [[numbers[req_id], p] for p in range(start, end)]


NUMBERS = {"a": 1, "b": 2, "c": 3}


def test_more_of_a_request_than_allowed_drops_the_oldest() -> None:
    kept = HiddenStates(4, most_of_a_request=6)
    for start in range(0, 12, 3):
        keep(kept, NUMBERS, {"a": (start, 3)})
    assert_kept(kept, NUMBERS, "a", 6, 12)


def test_a_full_buffer_drops_the_oldest_of_whoever_has_most() -> None:
    state_bytes = 2 * 4
    kept = HiddenStates(4, most_bytes=10 * state_bytes)
    keep(kept, NUMBERS, {"a": (0, 3)})
    keep(kept, NUMBERS, {"a": (3, 3), "b": (0, 1)})
    keep(kept, NUMBERS, {"b": (1, 2)})
    keep(kept, NUMBERS, {"c": (0, 4)})
    assert_kept(kept, NUMBERS, "a", 3, 6)
    assert_kept(kept, NUMBERS, "b", 0, 3)
    assert_kept(kept, NUMBERS, "c", 0, 4)


@pytest.mark.parametrize("forget", ["feeding", "finishing"])
def test_room_is_used_again(forget: str) -> None:
    state_bytes = 2 * 4
    kept = HiddenStates(4, most_bytes=6 * state_bytes)
    for step in range(20):
        keep(kept, NUMBERS, {"a": (4 * step, 4), "b": (step, 2)})
        assert_kept(kept, NUMBERS, "b", step, step + 2)
        if forget == "feeding":
            assert_kept(kept, NUMBERS, "a", 4 * step, 4 * step + 4)
            kept.forget_before("a", 4 * step + 4)
            kept.forget_before("b", step + 1)
            kept.forget_before("b", step + 2)
        kept.release("ab" if forget == "finishing" else ["never seen"])


def test_states_that_are_not_kept_are_refused() -> None:
    kept = HiddenStates(16)
    keep(kept, NUMBERS, {"a": (4, 4)})
    for start, end in ((3, 5), (7, 9)):
        with pytest.raises(ValueError, match="from 4 to 8"):
            kept.of(["a"], np.array([start]), np.array([end]))
