"""Greedy tokens, and verification by them without vLLM's rejection sampler."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_emssd.integration.v1.greedy import (
    argmax_with_confidence,
    emitted_tokens,
    greedy_tokens,
    is_all_greedy,
)

REQUEST = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=4)


@given(st.lists(REQUEST, min_size=1, max_size=5), st.randoms())
def test_emits_what_one_request_after_the_other_would(
    requests: list[list[tuple[int, int]]], dice: Any
) -> None:
    """Drafts and the target's tokens, of a vocabulary of two; rows in any order."""
    num_rows = sum(len(drafts) + 1 for drafts in requests)
    rows = list(range(num_rows + 2))
    dice.shuffle(rows)
    targets = np.full(num_rows + 2, 9)
    drafts, target_rows, bonus_rows, expected = [], [], [], []
    for request in requests:
        tokens, is_right = [], True
        for draft, target in request:
            drafts.append(draft)
            target_rows.append(rows.pop())
            targets[target_rows[-1]] = target
            if is_right:
                tokens.append(target)
            is_right = is_right and draft == target
        bonus_rows.append(rows.pop())
        targets[bonus_rows[-1]] = 5
        expected.append([*tokens, 5] if is_right else tokens)
    emitted = emitted_tokens(
        np.array([len(request) for request in requests]),
        np.array(drafts, dtype=np.int32),
        targets,
        np.array(target_rows, dtype=np.int64),
        np.array(bonus_rows, dtype=np.int64),
    )
    assert emitted.shape == (len(requests), max(map(len, requests)) + 1)
    for row, tokens in zip(emitted.tolist(), expected, strict=True):
        assert row == tokens + [-1] * (len(row) - len(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_of_equally_likely_tokens(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 2048, dtype=dtype)
    logits[0, 100] = logits[0, 1500] = 1.0
    logits[2] = float("nan")
    assert greedy_tokens(logits).tolist() == [100, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_confidence_is_the_highest_probability(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 2048).mul(4).to(dtype)
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    logits[3] = float("-inf")
    tokens, wanted = greedy_tokens(logits), logits.softmax(-1, torch.float32)
    assert argmax_with_confidence(logits, False)[0].tolist() == tokens.tolist()
    found, confidence = argmax_with_confidence(logits, True)
    assert found.tolist() == tokens.tolist()
    assert confidence is not None
    expected = wanted.amax(-1).nan_to_num().tolist()
    assert confidence.tolist() == pytest.approx(expected)
    assert confidence[1:4].tolist() == [0.0, 0.0, 0.0]


def processor(kind: type, **state: Any) -> Any:
    made = kind.__new__(kind)
    vars(made).update(state)
    return made


PLAIN = SamplingMetadata(
    temperature=None,
    all_greedy=True,
    all_random=False,
    top_p=None,
    top_k=None,
    generators={},
    max_num_logprobs=None,
    no_penalties=True,
    prompt_token_ids=None,
    frequency_penalties=torch.empty(0),
    presence_penalties=torch.empty(0),
    repetition_penalties=torch.empty(0),
    output_token_ids=[],
    allowed_token_ids_mask=None,
    bad_words_token_ids={},
    logitsprocs=SimpleNamespace(  # type: ignore[arg-type]
        non_argmax_invariant=[
            processor(MinTokensLogitsProcessor, min_toks={}),
            processor(LogitBiasLogitsProcessor, biases={}),
        ]
    ),
)


def with_processor(one: Any) -> Any:
    return SimpleNamespace(non_argmax_invariant=[one])


@pytest.mark.parametrize(
    "change",
    [
        {"all_greedy": False},
        {"no_penalties": False},
        {"max_num_logprobs": 0},
        {"logprob_token_ids": {0: [1]}},
        {"bad_words_token_ids": {0: [[1]]}},
        {"allowed_token_ids_mask": torch.zeros(1, 1, dtype=torch.bool)},
        {
            "thinking_budget_state_holder": SimpleNamespace(
                has_tracked_requests=lambda: True
            )
        },
        {
            "logitsprocs": with_processor(
                processor(MinTokensLogitsProcessor, min_toks={0: (1, [], set())})
            )
        },
        {
            "logitsprocs": with_processor(
                processor(LogitBiasLogitsProcessor, biases={0: {1: 2.0}})
            )
        },
        {"logitsprocs": with_processor(object())},
    ],
    ids=lambda change: next(iter(change)),
)
def test_only_where_nothing_changes_the_logits(change: dict[str, Any]) -> None:
    assert is_all_greedy(PLAIN)
    assert not is_all_greedy(dataclasses.replace(PLAIN, **change))
