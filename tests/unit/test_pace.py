"""What a token is worth by how fast its request gets tokens."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_emssd.draft_length.pace import Pace


def paced(steps: dict[str, int], num_steps: int = 60) -> Pace:
    pace = Pace()
    for _ in range(num_steps):
        for req_id, num_tokens in steps.items():
            pace.observe(req_id, num_tokens)
    return pace


def test_before_any_step_all_are_alike() -> None:
    assert Pace().worth(["a", "b"]).tolist() == [1.0, 1.0]
    assert Pace().worth([]).tolist() == []


def test_a_slow_requests_token_is_worth_more() -> None:
    slow, fast, new = paced({"slow": 1, "fast": 4}).worth(["slow", "fast", "new"])
    assert slow == pytest.approx(np.sqrt(2.5 / 1), rel=0.1)
    assert fast == pytest.approx(np.sqrt(2.5 / 4), rel=0.1)
    assert new == pytest.approx(1.0)


def test_one_pace_for_all_is_worth_one_each() -> None:
    assert paced({"a": 3, "b": 3}).worth(["a", "b"]) == pytest.approx([1, 1])


def test_one_lucky_step_counts_little() -> None:
    pace = paced({"a": 2, "b": 2})
    pace.observe("new", 9)
    assert pace.worth(["new"])[0] > 0.6


def test_follows_a_change() -> None:
    pace = paced({"a": 4, "b": 2})
    for _ in range(600):
        pace.observe("a", 1)
        pace.observe("b", 2)
    assert pace.worth(["a"])[0] > 1 > pace.worth(["b"])[0]


def test_released_request_is_forgotten() -> None:
    pace = paced({"a": 1, "b": 5})
    pace.release("a")
    pace.release("never seen")
    assert pace.worth(["a"])[0] == pytest.approx(1.0)
    assert list(pace._own) == ["b"]
