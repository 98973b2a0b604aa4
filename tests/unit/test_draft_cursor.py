"""Draft K/V validity: each rule on its own.

How the rules work together is tested in test_draft_model.py, by simulation.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor

BLOCK_SIZE = 4


def cursor_of(
    *block_ids: int, num_fed: int = 0, trust_cached_blocks: bool = True
) -> DraftCursor:
    """A cursor that knows request "a" on these fresh blocks."""
    cursor = DraftCursor(32, BLOCK_SIZE, trust_cached_blocks)
    cursor.update_blocks([AdmittedRequest("a", block_ids, 0)], [])
    cursor.advance("a", num_fed)
    return cursor


def admit(cursor: DraftCursor, *block_ids: int, num_hit_blocks: int) -> int:
    """Admit request "b"; returns its cursor."""
    request = AdmittedRequest("b", block_ids, num_hit_blocks * BLOCK_SIZE)
    cursor.update_blocks([request], [])
    return cursor.draft_len("b")


@pytest.mark.parametrize("block_size", [0, -1])
def test_refuses_block_size_below_one(block_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"block_size must be at least 1.*{block_size}"
    ):
        DraftCursor(8, block_size)


def test_cannot_go_back() -> None:
    cursor = cursor_of(0, 1, num_fed=5)
    with pytest.raises(ValueError, match="cursor of a cannot go from 5 to 4"):
        cursor.advance("a", 4)
    assert cursor.draft_len("a") == 5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 6), st.integers(0, 7))
def test_accepted_drafts_count_as_far_as_they_were_fed(fed: int, accepted: int) -> None:
    cursor = cursor_of(0, 1, 2, num_fed=3)
    cursor.record_fed_drafts("a", fed)
    cursor.record_verified("a", accepted)
    assert cursor.draft_len("a") == 3 + min(fed, accepted)
    cursor.record_verified("a", accepted)
    assert cursor.draft_len("a") == 3 + min(fed, accepted), "counted twice"


def test_drafts_stay_pending_while_the_request_is_left_out() -> None:
    cursor = cursor_of(0, 1, num_fed=3)
    cursor.record_fed_drafts("a", 2)
    cursor.update_blocks([AdmittedRequest("b", [5], 0)], [])
    cursor.update_blocks([], [("b", [6])])
    cursor.record_verified("b", 0)
    cursor.record_verified("a", 2)
    assert cursor.draft_len("a") == 5


@pytest.mark.parametrize(
    ("num_fed", "num_whole_blocks"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (12, 3)]
)
def test_hit_is_usable_where_the_drafter_wrote_whole_blocks(
    num_fed: int, num_whole_blocks: int
) -> None:
    cursor = cursor_of(3, 1, 2, num_fed=num_fed)
    found = admit(cursor, 3, 1, 2, 9, num_hit_blocks=3)
    assert found == num_whole_blocks * BLOCK_SIZE


def test_blocks_fill_up_over_many_small_advances() -> None:
    cursor = cursor_of(3, 1)
    for draft_len in (1, 3, 4, 6, 8):
        cursor.advance("a", draft_len)
    assert admit(cursor, 3, 1, 9, num_hit_blocks=2) == 8


def test_accepted_drafts_make_a_block_whole() -> None:
    cursor = cursor_of(3, 1, num_fed=3)
    cursor.record_fed_drafts("a", 2)
    cursor.record_verified("a", 1)
    assert admit(cursor, 3, 9, num_hit_blocks=1) == 4


def test_usable_hit_ends_at_the_first_block_that_is_not_whole() -> None:
    cursor = cursor_of(3, 1, 2, num_fed=12)
    cursor.update_blocks([AdmittedRequest("c", [1], 0)], [])  # 1 was evicted
    assert admit(cursor, 3, 1, 2, 9, num_hit_blocks=3) == 4


def test_only_the_hit_part_is_looked_up() -> None:
    cursor = cursor_of(3, 1, num_fed=8)
    assert admit(cursor, 3, 1, num_hit_blocks=1) == 4
    assert admit(cursor, 3, 1, num_hit_blocks=2) == 4, "1 was allocated anew"


def test_release_keeps_whole_blocks() -> None:
    cursor = cursor_of(3, 1, num_fed=8)
    cursor.release("a")
    cursor.release("a")  # vLLM may name a request that never reached this worker
    with pytest.raises(KeyError):
        cursor.draft_len("a")
    assert admit(cursor, 3, 1, 9, num_hit_blocks=2) == 8


def test_appended_block_is_cleared() -> None:
    cursor = cursor_of(3, num_fed=4)
    cursor.update_blocks([AdmittedRequest("c", [7], 0)], [])
    cursor.update_blocks([], [("c", [3])])
    assert admit(cursor, 3, 9, num_hit_blocks=1) == 0


@pytest.mark.parametrize("hit_first", [True, False])
def test_hit_on_a_block_allocated_in_the_same_step(hit_first: bool) -> None:
    """Block 3 was whole, is given to "c", and "b" hits its new content at once."""
    cursor = cursor_of(3, num_fed=4)
    fresh = AdmittedRequest("c", [3], 0)
    hit = AdmittedRequest("b", [3, 9], BLOCK_SIZE)
    cursor.update_blocks([hit, fresh] if hit_first else [fresh, hit], [])
    assert cursor.draft_len("b") == 0


def test_hit_on_a_block_appended_in_the_same_step() -> None:
    cursor = cursor_of(3, num_fed=4)
    cursor.update_blocks([AdmittedRequest("c", [7], 0)], [])
    hit = AdmittedRequest("b", [3, 9], BLOCK_SIZE)
    cursor.update_blocks([hit], [("c", [3])])
    assert cursor.draft_len("b") == 0


def test_resumed_request_starts_from_its_blocks() -> None:
    cursor = cursor_of(3, 1, num_fed=7)
    cursor.record_fed_drafts("a", 3)
    cursor.update_blocks([AdmittedRequest("a", [3, 5], BLOCK_SIZE)], [])
    assert cursor.draft_len("a") == 4
    cursor.record_verified("a", 3)
    assert cursor.draft_len("a") == 4, "drafts from before preemption counted"


def test_hits_are_not_trusted_where_others_fill_blocks() -> None:
    cursor = cursor_of(3, 1, num_fed=8, trust_cached_blocks=False)
    assert admit(cursor, 3, 1, 9, num_hit_blocks=2) == 0


def test_unknown_request_breaks_loudly() -> None:
    cursor = cursor_of(0)
    with pytest.raises(KeyError):
        cursor.update_blocks([], [("unknown", [1])])
