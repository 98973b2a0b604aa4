"""Hidden states that wait for an EAGLE head, by the KV slot of their token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_emssd.proposers.hidden_states import HiddenStates

NUM_BLOCKS, BLOCK_SIZE = 5, 4
STATE_BYTES = 2 * 4  # two layers of one float32 each


def kept_states(most: int) -> HiddenStates:
    return HiddenStates(NUM_BLOCKS, BLOCK_SIZE, 4, most * STATE_BYTES)


def keep(kept: HiddenStates, step: int, kv_slots: Sequence[int]) -> None:
    """A state tells its step and slot. Rows of padding follow."""
    rows = torch.tensor([[step, slot] for slot in [*kv_slots, 99]], dtype=torch.float32)
    kept.keep([rows[:, :1], rows[:, 1:]], torch.tensor(kv_slots))


def present(kept: HiddenStates) -> dict[int, int]:
    """Steps of the states that are here, by slot."""
    is_here = kept.are_here(np.arange(NUM_BLOCKS * BLOCK_SIZE))
    kv_slots = np.flatnonzero(is_here)
    states = kept.of(torch.from_numpy(kv_slots)).long()
    assert states[:, 1].tolist() == kv_slots.tolist()
    return dict(zip(kv_slots.tolist(), states[:, 0].tolist(), strict=True))


def test_a_state_is_found_by_slot_until_it_is_replaced() -> None:
    kept = kept_states(20)
    keep(kept, 1, [7, 3])
    keep(kept, 2, [4, 3])
    assert present(kept) == {7: 1, 4: 2, 3: 2}


def test_a_full_buffer_drops_the_oldest() -> None:
    kept = kept_states(6)
    for step in range(20):
        keep(kept, step, [step, (step + 10) % 20])
        last = range(max(step - 2, 0), step + 1)
        slots = {s: t for t in last for s in (t, (t + 10) % 20)}
        assert present(kept) == slots


def test_a_steps_states_stay_together() -> None:
    """Where they do not fit in what is left of the buffer, that is left empty."""
    kept = kept_states(5)
    keep(kept, 1, [0, 1, 2])
    keep(kept, 2, [3, 4, 5, 6])
    assert present(kept) == {3: 2, 4: 2, 5: 2, 6: 2}


def test_a_steps_tokens_find_room_whatever_the_bound() -> None:
    kept = kept_states(0)
    keep(kept, 1, [0, 1, 2, 3])
    assert present(kept) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_states_of_blocks_with_new_content_are_forgotten() -> None:
    kept = kept_states(20)
    kept.forget([1])  # nothing was kept yet
    keep(kept, 1, [0, 4, 7, 8])
    kept.forget([1, 3])
    assert present(kept) == {0: 1, 8: 1}
