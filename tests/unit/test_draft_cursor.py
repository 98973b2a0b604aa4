"""Draft K/V validity: what the simulation in test_draft_model.py does not come to."""

from __future__ import annotations

import pytest

from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor

BLOCK_SIZE = 4


def cursor_of(*block_ids: int, num_fed: int = 0) -> DraftCursor:
    """A cursor that knows request "a" on these fresh blocks."""
    cursor = DraftCursor(32, BLOCK_SIZE)
    cursor.update_blocks([AdmittedRequest("a", block_ids, 0)], [])
    cursor.advance("a", num_fed)
    return cursor


def admit(cursor: DraftCursor, *block_ids: int, num_hit_blocks: int) -> int:
    """Admit request "b"; returns its cursor."""
    request = AdmittedRequest("b", block_ids, num_hit_blocks * BLOCK_SIZE)
    cursor.update_blocks([request], [])
    return cursor.draft_len("b")


def test_cannot_go_back() -> None:
    cursor = cursor_of(0, 1, num_fed=5)
    with pytest.raises(AssertionError):
        cursor.advance("a", 4)
    assert cursor.draft_len("a") == 5


def test_release_keeps_whole_blocks() -> None:
    cursor = cursor_of(3, 1, num_fed=8)
    cursor.release("a")
    cursor.release("a")  # vLLM may name a request that never reached this worker
    with pytest.raises(KeyError):
        cursor.draft_len("a")
    assert admit(cursor, 3, 1, 9, num_hit_blocks=2) == 8


@pytest.mark.parametrize("hit_first", [True, False])
def test_hit_on_a_block_allocated_in_the_same_step(hit_first: bool) -> None:
    """Block 3 was whole, is given to "c", and "b" hits its new content at once."""
    cursor = cursor_of(3, num_fed=4)
    fresh = AdmittedRequest("c", [3], 0)
    hit = AdmittedRequest("b", [3, 9], BLOCK_SIZE)
    cursor.update_blocks([hit, fresh] if hit_first else [fresh, hit], [])
    assert cursor.draft_len("b") == 0


def test_unknown_request_breaks_loudly() -> None:
    cursor = cursor_of(0)
    with pytest.raises(KeyError):
        cursor.update_blocks([], [("unknown", [1])])
