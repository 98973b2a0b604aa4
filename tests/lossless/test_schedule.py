"""Exact however requests come and go: staggered, resumed, on whole cached blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine import (
    ONE_OUTCOME,
    EngineConfig,
    prompts,
    running,
    stats,
    stop_counting_others,
    vllm_counters,
)
from tests.lossless.engines import CONFIGS, OURS

NAMES = [*OURS, pytest.param("mixed", marks=pytest.mark.slow)]
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
SAMPLED = SamplingParams(**ONE_OUTCOME, max_tokens=32, ignore_eos=True)
LONG = (
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n" * 60
)


def _token_ids(llm: Any, texts: Any, params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate(texts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _staggered(llm: Any, texts: list[str], params: SamplingParams) -> list[list[int]]:
    """One more request every second step."""
    engine, waiting, done = llm.llm_engine, list(enumerate(texts)), {}
    for step in range(2000):
        if waiting and step % 2 == 0:
            i, text = waiting.pop(0)
            engine.add_request(f"staggered-{i}", {"prompt": text}, params)
        for output in engine.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        if not waiting and not engine.has_unfinished_requests():
            break
    return [done[f"staggered-{i}"] for i in range(len(texts))]


def _whole_blocks_and_one(llm: Any) -> dict[str, list[int]]:
    block_size = llm.llm_engine.vllm_config.cache_config.block_size
    token_ids = llm.get_tokenizer().encode(LONG)[: 2 * block_size + 1]
    assert len(token_ids) == 2 * block_size + 1
    return {"prompt_token_ids": token_ids}


@cache
def plain() -> dict[str, list[list[int]]]:
    with running(EngineConfig()) as llm:
        return {
            "texts": _token_ids(llm, list(prompts()[:24]), GREEDY),
            "blocks": _token_ids(llm, [_whole_blocks_and_one(llm)], GREEDY),
        }


@pytest.mark.parametrize("name", NAMES)
def test_arrivals_and_whole_cached_blocks(name: str) -> None:
    expected = plain()
    stop_counting_others()
    with running(CONFIGS[name]) as llm:
        assert _token_ids(llm, list(prompts()[:3]), GREEDY) == expected["texts"][:3]
        texts = list(prompts()[:24])
        assert _staggered(llm, texts, GREEDY) == expected["texts"]
        assert _staggered(llm, texts[:8], SAMPLED) == expected["texts"][:8]
        prompt = _whole_blocks_and_one(llm)
        for params in (GREEDY, GREEDY, SAMPLED):
            assert _token_ids(llm, [prompt], params) == expected["blocks"]
            # Beside a running request stock would pad the hit with -1 drafts.
            together = _token_ids(llm, [prompt, prompt, texts[0]], params)
            assert together == [*expected["blocks"] * 2, expected["texts"][0]]
        seen = vllm_counters(llm)
        assert seen["vllm:prefix_cache_hits"] > 0
        assert seen["vllm:spec_decode_num_accepted_tokens"] > 0
        drafts = seen["vllm:spec_decode_num_draft_tokens"]
        assert stats(llm)["num_draft_tokens"] == drafts
