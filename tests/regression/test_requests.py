"""Requests at the edges: aborted, at the model's length, of one token."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import (
    DRAFT_MODEL,
    LLMA,
    MAX_MODEL_LEN,
    EngineConfig,
    greedy,
    model_runner,
    prompts,
    running,
)

OURS = {"draft_model": DRAFT_MODEL, "llma": LLMA}
LONG = "def add(first, second):\n    return first + second\n\n\n" * 200


def _edge_prompts(llm: Any) -> list[dict[str, list[int]]]:
    """One token; two; all but a few of the longest context; one short of it."""
    tokenizer = llm.get_tokenizer()
    long = tokenizer.encode(LONG)
    lengths = (1, 2, MAX_MODEL_LEN - 9, MAX_MODEL_LEN - 2, MAX_MODEL_LEN - 1)
    assert len(long) > MAX_MODEL_LEN
    return [{"prompt_token_ids": long[:length]} for length in lengths]


def _with_aborts(llm: Any) -> dict[str, list[int]]:
    """Twelve requests, every third aborted after a few steps; the others' tokens."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for i, text in enumerate(prompts()[:12]):
        engine.add_request(str(i), {"prompt": text}, params)
    done: dict[str, list[int]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 4:
            engine.abort_request([str(i) for i in range(0, 12, 3)])
        assert steps < 1000
    return done


@pytest.fixture(scope="module")
def plain() -> tuple[list[list[int]], list[list[int]]]:
    with running(EngineConfig()) as llm:
        edges = greedy(llm, _edge_prompts(llm), max_tokens=64)
        return edges, greedy(llm, list(prompts()[:12]), max_tokens=40)


@pytest.mark.parametrize("proposer", OURS)
def test_edges(proposer: str, plain: tuple[list[list[int]], list[list[int]]]) -> None:
    edges, whole = plain
    with running(EngineConfig(OURS[proposer], prefix_caching=True)) as llm:
        assert greedy(llm, _edge_prompts(llm), max_tokens=64) == edges
        assert [len(tokens) for tokens in edges[2:]] == [9, 2, 1]

        kept = _with_aborts(llm)
        survivors = [i for i in range(12) if i % 3]
        assert {int(i) for i in kept if int(i) % 3} == set(survivors)
        for i in survivors:
            assert kept[str(i)] == whole[i]

        _any_max_tokens_is_served(llm)
        _refused_prompts(llm)
        _nothing_is_kept_of_finished_requests(llm)


def _any_max_tokens_is_served(llm: Any) -> None:
    """Beyond what a runner's integers hold; the context ends the answer."""
    tokens = llm.get_tokenizer().encode(LONG)[: MAX_MODEL_LEN - 40]
    for max_tokens in (2**31, 2**63, 2**64 - 1):
        (answer,) = greedy(llm, [{"prompt_token_ids": tokens}], max_tokens=max_tokens)
        assert len(answer) == 40


def _refused_prompts(llm: Any) -> None:
    """Empty, or with no room for an answer: refused by name, and the engine lives."""
    from vllm.exceptions import VLLMValidationError

    tokens = llm.get_tokenizer().encode(LONG)
    for length, message in (
        (0, "empty"),
        (MAX_MODEL_LEN, "maximum.*length|max_model_len"),
        (MAX_MODEL_LEN + 1, "maximum.*length|max_model_len"),
    ):
        with pytest.raises(VLLMValidationError, match=f"(?i){message}"):
            greedy(llm, [{"prompt_token_ids": tokens[:length]}], max_tokens=4)
    for outside in (-1, 10**9):
        with pytest.raises(VLLMValidationError, match=r"(?i)token"):
            greedy(llm, [{"prompt_token_ids": [1, outside]}], max_tokens=4)


def _nothing_is_kept_of_finished_requests(llm: Any) -> None:
    greedy(llm, ["x"], max_tokens=2)  # a step tells the worker which finished
    runner = model_runner(llm)
    assert len(runner.num_real_drafts) <= 1
    if runner._cursor is not None:
        assert len(runner._cursor._requests) <= 1
    else:
        assert len(runner._proposer._requests) <= 1
