"""What a token is worth by what its request's tokens cost."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_emssd.draft_length.pace import Pace

STEPS_ALONE = (1.0, 0.0, 0.0)  # ms of a step's share, a row, a draft: drafts are free


def paced(steps: dict[str, tuple[int, int]], num_steps: int = 60) -> Pace:
    """Each request's drafts and tokens a step."""
    pace = Pace()
    for _ in range(num_steps):
        for req_id, (num_drafts, num_tokens) in steps.items():
            pace.observe(req_id, num_drafts, num_tokens)
    return pace


def test_before_any_step_all_are_alike() -> None:
    assert Pace().worth(["a", "b"], *STEPS_ALONE).tolist() == [1.0, 1.0]
    assert Pace().worth([], *STEPS_ALONE).tolist() == []
    assert paced({"a": (0, 1)}).worth([], *STEPS_ALONE).tolist() == []


def test_where_drafts_are_free_a_slow_requests_token_is_worth_its_steps() -> None:
    pace = paced({"slow": (3, 1), "fast": (3, 4)})
    slow, fast, new = pace.worth(["slow", "fast", "new"], *STEPS_ALONE)
    assert slow == pytest.approx(2.5 / 1, rel=0.15)
    assert fast == pytest.approx(2.5 / 4, rel=0.15)
    assert new == pytest.approx(1.0)


def test_a_fast_requests_token_is_worth_its_rows_too() -> None:
    """4 ms for 1 token, and 4 + 3 * 3 ms for 4: in all 17 ms for 5."""
    pace = paced({"slow": (0, 1), "fast": (3, 4)}, 600)
    slow, fast = pace.worth(["slow", "fast"], 4.0, 1.0, 2.0)
    assert slow == pytest.approx(4 / (17 / 5), rel=0.1)
    assert fast == pytest.approx(13 / 4 / (17 / 5), rel=0.1)


def test_copies_cost_rows_only() -> None:
    """4 + 3 * 3 ms for 4 tokens drafted, 4 + 3 * 1 ms for 4 copied."""
    pace = paced({"drafts": (3, 4)}, 600)
    for _ in range(600):
        pace.observe("drafts", 3, 4)
        pace.observe("copies", 3, 4, are_copies=True)
    drafts, copies = pace.worth(["drafts", "copies"], 4.0, 1.0, 2.0)
    assert drafts / copies == pytest.approx(13 / 7, rel=0.1)


def test_where_all_is_free_all_are_alike_in_being_worth_nothing() -> None:
    worth = paced({"a": (0, 1), "b": (3, 4)}).worth(["a", "b"], 0.0, 0.0, 0.0)
    assert np.isfinite(worth).all()


def test_one_pace_for_all_is_worth_one_each() -> None:
    pace = paced({"a": (5, 3), "b": (5, 3)})
    assert pace.worth(["a", "b"], 2.0, 0.5, 0.5) == pytest.approx([1, 1])


def test_one_lucky_step_counts_little() -> None:
    pace = paced({"a": (8, 2), "b": (8, 2)})
    pace.observe("new", 8, 9)
    assert pace.worth(["new"], *STEPS_ALONE)[0] > 0.35


def test_follows_a_change() -> None:
    pace = paced({"a": (4, 4), "b": (4, 2)})
    for _ in range(600):
        pace.observe("a", 4, 1)
        pace.observe("b", 4, 2)
    a, b = pace.worth(["a", "b"], *STEPS_ALONE)
    assert a > 1 > b


def test_released_request_is_forgotten() -> None:
    pace = paced({"a": (4, 1), "b": (4, 5)})
    pace.release("a")
    pace.release("never seen")
    assert pace.worth(["a"], *STEPS_ALONE)[0] == pytest.approx(1.0)
    assert list(pace._own) == ["b"]
