"""Requests at the edges: aborted, at the model's length, of one token; and however they
come and go: staggered, resumed, on whole cached blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.engine import (
    DRAFT_MODEL,
    LLMA,
    MAX_MODEL_LEN,
    MIXED,
    ONE_OUTCOME,
    EngineConfig,
    counting,
    greedy,
    model_runner,
    prompts,
    running,
    session_tokens,
    stop_counting_others,
)

OURS = {"draft_model": DRAFT_MODEL, "llma": LLMA, "mixed": MIXED}
LONG = "def add(first, second):\n    return first + second\n\n\n" * 200
TEXTS = list(prompts()[:24])
Plain = dict[str, list[list[int]]]


def _long(llm: Any, num_tokens: int) -> dict[str, list[int]]:
    token_ids = llm.get_tokenizer().encode(LONG)
    assert len(token_ids) > MAX_MODEL_LEN
    return {"prompt_token_ids": token_ids[:num_tokens]}


def _edge_prompts(llm: Any) -> list[dict[str, list[int]]]:
    """One token; two; all but a few of the longest context; one short of it."""
    lengths = (1, 2, MAX_MODEL_LEN - 9, MAX_MODEL_LEN - 2, MAX_MODEL_LEN - 1)
    return [_long(llm, length) for length in lengths]


def _whole_blocks_and_one(llm: Any) -> dict[str, list[int]]:
    return _long(llm, 2 * llm.llm_engine.vllm_config.cache_config.block_size + 1)


def _sessions(llm: Any) -> list[list[int]]:
    texts = [text[:300] for text in TEXTS[:9]]
    return [session_tokens(llm, texts[i::3], max_tokens=11) for i in range(3)]


@pytest.fixture(scope="module")
def plain() -> Plain:
    with running(EngineConfig()) as llm:
        return {
            "edges": greedy(llm, _edge_prompts(llm), max_tokens=64),
            "texts": greedy(llm, TEXTS, max_tokens=32),
            "blocks": greedy(llm, [_whole_blocks_and_one(llm)], max_tokens=32),
            "sessions": _sessions(llm),
        }


@pytest.fixture(
    scope="module",
    params=["draft_model", "llma", pytest.param("mixed", marks=pytest.mark.slow)],
)
def llm(request: pytest.FixtureRequest, plain: Plain) -> Iterator[Any]:
    """There is one engine at a time."""
    stop_counting_others()
    config = {"prefix_caching": True, "max_num_batched_tokens": 192}
    with running(EngineConfig(OURS[request.param], **config)) as llm:
        yield llm


def test_edges(llm: Any, plain: Plain) -> None:
    edges = greedy(llm, _edge_prompts(llm), max_tokens=64)
    assert edges == plain["edges"]
    assert [len(tokens) for tokens in edges[2:]] == [9, 2, 1]


def _arriving(
    llm: Any, texts: list[str], every: int, abort_at: int = -1, **parameters: Any
) -> dict[int, list[int]]:
    """Tokens by request. One comes in each `every`-th step (0: all at once); in the
    step `abort_at` every third is aborted."""
    wanted = {"temperature": 0, "max_tokens": 32, "ignore_eos": True} | parameters
    engine, done = llm.llm_engine, {}
    for step in range(2000):
        for i, text in enumerate(texts):
            if step == every * i:
                engine.add_request(str(i), {"prompt": text}, SamplingParams(**wanted))
        if step == abort_at:
            engine.abort_request([str(i) for i in range(0, len(texts), 3)])
        for output in engine.step():
            if output.finished:
                done[int(output.request_id)] = list(output.outputs[0].token_ids)
        if step >= every * len(texts) and not engine.has_unfinished_requests():
            break
    return done


@pytest.mark.parametrize(("num", "parameters"), [(24, {}), (8, ONE_OUTCOME)])
def test_staggered_arrivals(
    llm: Any, plain: Plain, num: int, parameters: dict[str, Any]
) -> None:
    done = _arriving(llm, TEXTS[:num], every=2, **parameters)
    assert [done[i] for i in range(num)] == plain["texts"][:num]


def test_those_beside_aborted_requests_go_on(llm: Any, plain: Plain) -> None:
    done = _arriving(llm, TEXTS[:12], every=0, abort_at=4)
    survivors = {i: plain["texts"][i] for i in range(12) if i % 3}
    assert {i: tokens for i, tokens in done.items() if i % 3} == survivors


def test_whole_cached_blocks(llm: Any, plain: Plain) -> None:
    """Beside a running request stock would pad the hit with -1 drafts."""
    prompt, expected = _whole_blocks_and_one(llm), plain["blocks"]
    with counting(llm) as seen:
        for parameters in ({}, {}, ONE_OUTCOME):
            assert greedy(llm, [prompt], 32, **parameters) == expected
            together = greedy(llm, [prompt, prompt, TEXTS[0]], 32, **parameters)
            assert together == [*expected * 2, plain["texts"][0]]
    assert seen["vllm:prefix_cache_hits"] > 0
    assert seen["vllm:spec_decode_num_accepted_tokens"] > 0
    assert seen["num_draft_tokens"] == seen["vllm:spec_decode_num_draft_tokens"]


def test_streaming_sessions(llm: Any, plain: Plain) -> None:
    """Answers end within accepted drafts, which the next input must not follow."""
    assert _sessions(llm) == plain["sessions"]


def test_any_max_tokens_is_served(llm: Any) -> None:
    """Beyond what a runner's integers hold; the context ends the answer."""
    for max_tokens in (2**31, 2**63, 2**64 - 1):
        (answer,) = greedy(llm, [_long(llm, MAX_MODEL_LEN - 40)], max_tokens)
        assert len(answer) == 40


def test_refused_prompts(llm: Any) -> None:
    """Empty, or with no room for an answer: refused by name, and the engine lives."""
    for length, message in (
        (0, "empty"),
        (MAX_MODEL_LEN, "maximum.*length|max_model_len"),
        (MAX_MODEL_LEN + 1, "maximum.*length|max_model_len"),
    ):
        with pytest.raises(VLLMValidationError, match=f"(?i){message}"):
            greedy(llm, [_long(llm, length)], max_tokens=4)
    for outside in (-1, 10**9):
        with pytest.raises(VLLMValidationError, match=r"(?i)token"):
            greedy(llm, [{"prompt_token_ids": [1, outside]}], max_tokens=4)


def test_nothing_is_kept_of_finished_requests(llm: Any) -> None:
    greedy(llm, ["x"], max_tokens=2)  # a step tells the worker which finished
    runner = model_runner(llm)
    assert len(runner.num_real_drafts) <= 1
    kept_by = runner._proposer if runner._cursor is None else runner._cursor
    assert len(kept_by._requests) <= 1
