"""Placeholder drafts cost rows: they are unscheduled, and nothing else is."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_emssd.integration.scheduler import drop_placeholder_drafts


def output_of(drafts: list[list[int] | None], num_other: list[int]) -> SimpleNamespace:
    """`drafts[i]` of request i, None where it has no entry, besides other tokens."""
    num_scheduled = {
        f"r{i}": num_other[i] + len(tokens or ()) for i, tokens in enumerate(drafts)
    }
    return SimpleNamespace(
        scheduled_spec_decode_tokens={
            f"r{i}": list(tokens)
            for i, tokens in enumerate(drafts)
            if tokens is not None
        },
        num_scheduled_tokens=num_scheduled,
        total_num_scheduled_tokens=sum(num_scheduled.values()),
    )


DRAFTS = st.one_of(
    st.none(),
    st.lists(st.integers(0, 9), max_size=5),
    st.integers(1, 5).map(lambda length: [-1] * length),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(DRAFTS, st.integers(1, 9)), max_size=6))
def test_placeholders_go_and_real_drafts_stay(
    requests: list[tuple[list[int] | None, int]],
) -> None:
    output = output_of([d for d, _ in requests], [n for _, n in requests])
    kept = [None if d and d[0] == -1 else d for d, _ in requests]
    drop_placeholder_drafts(output)
    assert output == output_of(kept, [n for _, n in requests])


def test_dropping_twice_is_dropping_once() -> None:
    output = output_of([[-1, -1, -1], [4, 5]], [1, 1])
    drop_placeholder_drafts(output)
    drop_placeholder_drafts(output)
    assert output.num_scheduled_tokens == {"r0": 1, "r1": 3}
    assert output.total_num_scheduled_tokens == 4
    assert output.scheduled_spec_decode_tokens == {"r1": [4, 5]}
