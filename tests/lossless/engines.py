"""Engines of the losslessness suite and what is sampled from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tests.engine import (
    DRAFT_MODEL,
    EAGLE3,
    LLMA,
    MIXED,
    STOCK,
    EngineConfig,
    counting,
    prompts,
    running,
)

NUM_PROMPTS = 8
CACHED = {"prefix_caching": True, "max_num_batched_tokens": 192}
# Thinking starts and ends with words of the prompts, the end being several tokens.
REASONING = {
    "options": {
        "reasoning_config": {
            "reasoning_start_str": "self",
            "reasoning_end_str": "return x",
        }
    }
}
CONFIGS = {
    # Whole prompts: vLLM's CPU runner fails on chunks of prompts with a seed.
    "plain": EngineConfig(
        prefix_caching=True, max_num_batched_tokens=8192, **REASONING
    ),
    "stock": EngineConfig(STOCK),
    "draft_model": EngineConfig(DRAFT_MODEL, **CACHED, **REASONING),
    "llma": EngineConfig(LLMA, **CACHED, **REASONING),
    "mixed": EngineConfig(MIXED, **CACHED, **REASONING),
    "eagle3": EngineConfig(EAGLE3, **CACHED, **REASONING),
    "eagle3, mixed": EngineConfig(
        EAGLE3 | {"proposer": "mixed"}, **CACHED, **REASONING
    ),
    "auto": EngineConfig(DRAFT_MODEL | {"draft_length": "auto"}, **REASONING),
    "llma, auto": EngineConfig(LLMA | {"draft_length": "auto"}, **CACHED, **REASONING),
    "mixed, auto": EngineConfig(MIXED | {"draft_length": "auto"}, **REASONING),
    "draft_model, padded": EngineConfig(
        DRAFT_MODEL | {"unpad_inputs": False}, **REASONING
    ),
    "llma, padded": EngineConfig(LLMA | {"unpad_inputs": False}, **REASONING),
    "mixed, padded": EngineConfig(MIXED | {"unpad_inputs": False}, **REASONING),
}
OURS = ("draft_model", "llma")


@dataclass(frozen=True, slots=True)
class Sampled:
    """Completions of some requests, and what speculation did for them."""

    token_ids: list[list[int]]
    texts: list[str]
    finish_reasons: list[str | None]
    logprobs: list[list[dict[int, float]]]
    prompt_logprobs: list[list[dict[int, float]]]
    num_draft_tokens: int
    num_accepted_tokens: int


def sample(llm: Any, texts: list[Any], params: Any) -> Sampled:
    """`params`: one SamplingParams, or one a prompt. All completions in order."""
    with counting(llm) as gained:
        outputs = llm.generate(texts, params, use_tqdm=False)
    return _sampled(outputs, gained)


def sample_together(
    llm: Any, cases: dict[str, tuple[list[Any], list[Any]]]
) -> dict[str, Sampled]:
    """Texts and parameters of several cases, all at once, without drafts."""
    texts, params = (
        [one for case in cases.values() for one in case[part]] for part in (0, 1)
    )
    outputs = iter(llm.generate(texts, params, use_tqdm=False))
    return {
        name: _sampled(list(islice(outputs, len(texts))), {})
        for name, (texts, _) in cases.items()
    }


def _sampled(outputs: list[Any], gained: dict[str, int]) -> Sampled:
    completions = [c for output in outputs for c in output.outputs]
    return Sampled(
        [list(c.token_ids) for c in completions],
        [c.text for c in completions],
        [c.finish_reason for c in completions],
        [_plain(c.logprobs) for c in completions],
        [_plain(output.prompt_logprobs) for output in outputs],
        gained.get("vllm:spec_decode_num_draft_tokens", 0),
        gained.get("vllm:spec_decode_num_accepted_tokens", 0),
    )


def _plain(logprobs: Any) -> list[dict[int, float]]:
    return [
        {token: entry.logprob for token, entry in (position or {}).items()}
        for position in logprobs or ()
    ]


def texts(count: int = NUM_PROMPTS) -> list[str]:
    return list(prompts()[:count])


@contextlib.contextmanager
def engine(name: str) -> Iterator[Any]:
    with running(CONFIGS[name]) as llm:
        yield llm
