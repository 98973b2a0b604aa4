"""What is fed before drafts are made, against loops over requests.

How the plan meets a cursor is in test_draft_model.py and in tests/v2.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from vllm_emssd.draft_length import DraftLengthPolicy, StepInfo
from vllm_emssd.feeding import grant_rows, plan_feeding


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 12)), st.integers(0, 60))
def test_grant_rows_equals_loop(wanted: list[int], budget: int) -> None:
    granted = grant_rows(np.array(wanted, dtype=np.int64), budget)
    assert granted.tolist() == oracle.granted(wanted, budget)
    assert granted.sum() == min(sum(wanted), budget)


NAMES = ["drafts", "behind", "shares", "pauses", "prefills", "waits to prefill"]
IS_SAMPLING = np.array([True, True, True, True, False, False])
MAY_DRAFT = np.array([True, True, True, False, True, False])
MISSING = np.array([2, 9, 7, 4, 6, 5])


@pytest.mark.parametrize(
    ("kept_rows", "prompt_rows", "max_num_rows", "num_rows", "draft_lens"),
    [
        (0, None, 99, [2, 9, 0, 0, 6, 0], [3, 3, 0, 0, 0, 0]),
        (0, None, 10, [2, 2, 0, 0, 6, 0], [3, 0, 0, 0, 0, 0]),
        (2, None, 99, [0, 7, 0, 0, 6, 0], [3, 3, 0, 0, 0, 0]),
        (2, None, 10, [0, 4, 0, 0, 6, 0], [3, 0, 0, 0, 0, 0]),
        (2, [1, 0, 0, 3, 6, 5], 99, [1, 7, 0, 3, 6, 5], [3, 3, 0, 0, 0, 0]),
    ],
)
def test_what_is_fed(
    kept_rows: int,
    prompt_rows: list[int] | None,
    max_num_rows: int,
    num_rows: list[int],
    draft_lens: list[int],
) -> None:
    """One begins in a block that another feeds: it is fed, and drafts, a step later."""
    most = np.where(IS_SAMPLING & MAY_DRAFT, 3, 0)
    rows, lens = plan_feeding(
        StepInfo(NAMES, IS_SAMPLING, most, MISSING, num_prefill_rows=11),
        DraftLengthPolicy(),
        MAY_DRAFT,
        lambda feeds: feeds & np.array([name == "shares" for name in NAMES]),
        max_num_rows,
        kept_rows,
        None if prompt_rows is None else np.array(prompt_rows),
    )
    assert (rows.tolist(), lens.tolist()) == (num_rows, draft_lens)


@pytest.mark.parametrize(("kept_rows", "num_rows"), [(0, 2), (2, 0)])
def test_a_policy_may_put_prompts_off(kept_rows: int, num_rows: int) -> None:
    policy = DraftLengthPolicy()
    policy.feeds_prompts = False
    step = StepInfo(
        ["a", "b"], np.array([True, False]), np.array([3, 0]), np.full(2, 2), 2
    )
    rows, lens = plan_feeding(
        step, policy, np.ones(2, dtype=bool), np.zeros_like, 99, kept_rows
    )
    assert (rows.tolist(), lens.tolist()) == ([num_rows, 0], [3, 0])
