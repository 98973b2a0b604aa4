"""Padding of drafts, and what is counted, against naive loops."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.metrics import Counters
from vllm_emssd.verification import ScheduledStep, pad_to_longest

property_test = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def ragged_drafts(draw: st.DrawFn) -> tuple[list[list[int]], list[bool], list[int]]:
    """Drafts, which may be padded (those that draft always may), and the filler."""
    drafts = draw(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6))
    may_pad = [bool(tokens) or draw(st.booleans()) for tokens in drafts]
    return drafts, may_pad, [100 + i for i in range(len(drafts))]


@property_test
@given(ragged_drafts())
def test_pad_to_longest_equals_loop(
    case: tuple[list[list[int]], list[bool], list[int]],
) -> None:
    drafts, may_pad, filler = case
    longest = max([len(tokens) for tokens in drafts], default=0)
    expected = []
    for i, tokens in enumerate(drafts):
        padded = list(tokens)
        while may_pad[i] and len(padded) < longest:
            padded.append(filler[i])
        expected.append(padded)
    before = [list(tokens) for tokens in drafts]
    assert pad_to_longest(drafts, may_pad, filler) == expected
    assert drafts == before, "the caller still needs the real drafts"


@property_test
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(1, 9), st.booleans(), st.integers(0, 5)
        ),
        min_size=1,
        max_size=7,
    )
)
def test_counts_equal_a_loop(requests: list[tuple[int, int, bool, int]]) -> None:
    """Requests that decode: drafts and accepted of them; or that prefill: tokens, and
    whether the chunk is the last."""
    num_spec_tokens = 5
    scheduled, drafts, decode, sampling, sampled = [], [], [], [], []
    for num_drafts, num_prompt, is_prefill, num_accepted in requests:
        decode.append(not is_prefill)
        drafts.append(0 if is_prefill else num_drafts)
        scheduled.append(num_prompt if is_prefill else 1 + num_drafts)
        sampling.append(not is_prefill or num_accepted > 2)
        sampled.append((1 + min(num_accepted, drafts[-1])) * sampling[-1])
    step = ScheduledStep(
        [f"r{i}" for i in range(len(requests))],
        *(np.array(x, np.int64) for x in (scheduled, drafts)),
        *(np.array(x, bool) for x in (decode, sampling)),
    )
    counters = Counters()
    step.count(np.array(sampled, np.int32), num_spec_tokens, counters)

    expected = dict.fromkeys(counters.as_dict(), 0) | {"num_steps": 1}
    longest = max((d for d, s in zip(drafts, sampling, strict=True) if s), default=0)
    for i in range(len(requests)):
        at_least = 1 + num_spec_tokens if decode[i] else scheduled[i]
        padded = max(scheduled[i], at_least) + num_spec_tokens
        expected["num_padded_draft_rows"] += padded
        expected["num_padded_draft_rows_decode"] += (
            padded if decode[i] else num_spec_tokens
        )
        if sampling[i]:
            expected["num_request_steps"] += 1
            expected["num_draft_tokens"] += drafts[i]
            expected["num_accepted_tokens"] += sampled[i] - 1
            expected["num_verify_rows"] += 1 + drafts[i]
            expected["num_padded_verify_rows"] += 1 + longest * decode[i]
            expected["num_emitted_tokens"] += sampled[i]
    assert counters.as_dict() == expected


def test_drafts_a_grammar_forbade_cost_rows_and_are_no_drafts() -> None:
    step = ScheduledStep(
        ["a", "b"],
        *(np.array(x, np.int64) for x in ([6, 6], [5, 5])),
        *(np.array(x, bool) for x in ([True, True], [True, True])),
        num_forbidden=np.array([3, 0]),
    )
    counters = Counters()
    step.count(np.array([3, 6]), 5, counters)
    assert counters.num_draft_tokens == 7
    assert counters.num_accepted_tokens == 7
    assert counters.num_verify_rows == 12


def test_a_request_that_had_ended_costs_rows_and_emits_nothing() -> None:
    step = ScheduledStep(
        ["a", "b"],
        *(np.array(x, np.int64) for x in ([6, 6], [5, 5])),
        *(np.array(x, bool) for x in ([True, True], [True, True])),
    )
    counters, wanted = Counters(), Counters()
    step.count(np.array([3, 6]), 5, counters, np.array([True, False]))
    step.count(np.array([3, 6]), 5, wanted)
    assert counters.num_request_steps == 1
    assert counters.num_draft_tokens == 5
    assert counters.num_accepted_tokens == 2
    assert counters.num_emitted_tokens == 3
    assert counters.num_verify_rows == wanted.num_verify_rows == 12
