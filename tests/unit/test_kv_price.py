"""The price of a row and a slot, from forwards whose price is known."""

from __future__ import annotations

import math

import pytest

from vllm_emssd.bench.comparison import compare_all
from vllm_emssd.bench.harness import Measurement
from vllm_emssd.bench.kv_price import (
    Forward,
    decode_forwards,
    row_slot_ms,
    stretched,
)
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import RequestStep, Round


def test_price_whatever_rows_cost() -> None:
    """Rows cost what they like; between equal rows only the cache differs."""
    row_ms = {4: 10.0, 8: 3.0, 9: 40.0}
    forwards = [
        Forward(rows, slots, ms + 0.25 * slots)
        for rows, ms in row_ms.items()
        for slots in (8, 16, 64)
    ]
    assert row_slot_ms(forwards) == pytest.approx(0.25)


def test_price_of_nothing() -> None:
    assert math.isnan(row_slot_ms([]))
    assert math.isnan(row_slot_ms([Forward(4, 8, 1.0)] * 5))


def test_decoding_steps_alone() -> None:
    """The second request's prompt takes two steps, which do not count."""
    done = Round(
        steps=[
            [RequestStep(0, 6, 0, 1), RequestStep(1, 4, 0, 0)],
            [RequestStep(0, 3, 2, 2), RequestStep(1, 1, 0, 1)],
            [RequestStep(0, 1, 0, 1), RequestStep(1, 4, 3, 1)],
            [RequestStep(1, 2, 1, 1)],
        ],
        target_forwards=[(10, 9.0), (4, 8.0), (5, 7.0), (2, 6.0)],
    )
    assert decode_forwards(done, [6, 5]) == [
        Forward(5, 1 * (8 + 1) + 4 * (5 + 4), 7.0),
        Forward(2, 2 * (6 + 2), 6.0),
    ]


def test_two_forwards_a_step_have_no_price() -> None:
    done = Round(steps=[[RequestStep(0, 2, 0, 1)]], target_forwards=[(1, 1.0)] * 2)
    with pytest.raises(ValueError, match="more than once a step"):
        decode_forwards(done, [2])


def test_stretched_contexts_fit() -> None:
    requests = [Request(list(range(1, n)), max_tokens=16, sampling={}) for n in (9, 90)]
    short, long = stretched(requests, max_model_len=128)
    assert [len(r.prompt_token_ids) for r in short] == [8, 32]
    assert [r.num_tokens for r in long] == [127, 127]
    for request, shorter, longer in zip(requests, short, long, strict=True):
        assert shorter.prompt_token_ids[-8:] == request.prompt_token_ids[-8:]
        assert longer.prompt_token_ids[-8:] == request.prompt_token_ids[-8:]


def test_estimate_of_vanilla() -> None:
    """Two requests of one verification each, prompts of 10 and 6 tokens, 2 rows each:
    vanilla reads 2 * (10 + 2) slots of each, padded inputs 12 and 8 in turn."""
    steps = [
        [RequestStep(0, 10, 0, 1), RequestStep(1, 6, 0, 1)],
        [RequestStep(0, 2, 1, 2), RequestStep(1, 2, 1, 1)],
    ]
    measured = Measurement(
        rounds={
            2: {
                "llma": [Round(seconds=2.0, num_tokens=5, steps=steps)],
                "llma-padded": [Round(seconds=3.0, num_tokens=5, steps=steps)],
            }
        },
        forwards={
            2: {
                "llma-padded": [Forward(4, slots, 125.0 * slots) for slots in (1, 2, 4)]
            }
        },
    )
    (result,) = compare_all(measured, [10, 6], k=5)
    found = result["vanilla"]["llma"]
    assert found["counts"]["vanilla"]["num_row_slots"] == 2 * 12 + 2 * 12
    assert found["counts"]["padded_inputs"]["num_row_slots"] == 2 * 12 + 2 * 8
    assert found["kv_padding_s"] == pytest.approx(1.0)
    assert found["over_padded_inputs"] == 1.5
    assert found["over_vanilla"] == pytest.approx(2.0)
