"""Runs of the suite, each made once and shared by all tests that look at it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.engine import (
    DRAFT_MODEL,
    EAGLE3,
    LLMA,
    ONE_OUTCOME,
    STOCK,
    STOCK_EAGLE3,
    EngineConfig,
    counting,
    counting_draft_rows,
    few_blocks,
    greedy,
    prompts,
    running,
    scheduler_of,
    stop_counting_others,
)
from vllm_emssd.metrics import COUNTER_NAMES

BATCHES = (1, 24)
SMALL_CACHE = 9 / 256  # of all blocks: a third of what 24 requests want
CHUNK = 192  # tokens a step: prompts of up to 1000 tokens come in pieces

CONFIGS = {
    "plain": EngineConfig(),
    "stock": EngineConfig(STOCK),
    "draft_model": EngineConfig(DRAFT_MODEL),
    "draft_model, cached": EngineConfig(
        DRAFT_MODEL, prefix_caching=True, max_num_batched_tokens=CHUNK
    ),
    "draft_model, padded": EngineConfig(DRAFT_MODEL | {"unpad_inputs": False}),
    "eagle3, stock": EngineConfig(STOCK_EAGLE3),
    "eagle3": EngineConfig(EAGLE3),
    "eagle3, cached": EngineConfig(
        EAGLE3, prefix_caching=True, max_num_batched_tokens=CHUNK
    ),
    "llma": EngineConfig(LLMA),
    "llma, cached": EngineConfig(
        LLMA, prefix_caching=True, max_num_batched_tokens=CHUNK
    ),
    "llma, padded": EngineConfig(LLMA | {"unpad_inputs": False}),
}
STOCKS = ("plain", "stock", "eagle3, stock")
# Of the engine of "..., cached", with most of its cache taken.
SMALL = [name.replace("cached", "small cache") for name in CONFIGS if "cached" in name]
OURS = [name for name in (*CONFIGS, *SMALL) if name not in STOCKS]


@dataclass(frozen=True, slots=True)
class Pass:
    """All batches once: what came out and what it cost."""

    token_ids: dict[int, list[list[int]]]  # batch size -> request -> tokens
    num_prompt_tokens: int
    num_accepted_tokens: int  # by vLLM's counter
    num_draft_tokens: int
    num_preemptions: int
    num_cached_tokens: int
    draft_rows: int  # by the hook on the draft model
    draft_forwards: int
    counts: dict[str, int]  # the plugin's, of this pass


@dataclass(frozen=True, slots=True)
class Run:
    first: Pass
    second: Pass  # with prefix caching the same prompts again; preempted ones sampled
    worker: str
    scheduler: str


def batch_prompts(size: int) -> list[str]:
    return list(prompts()[:size])


def plain_tokens(size: int) -> list[list[int]]:
    return run("plain").first.token_ids[max(BATCHES)][:size]


def _one_pass(llm: Any, **parameters: Any) -> Pass:
    with counting(llm) as gained, counting_draft_rows(llm) as rows:
        token_ids = {
            size: greedy(llm, batch_prompts(size), **parameters) for size in BATCHES
        }
    return Pass(
        token_ids,
        gained["vllm:prompt_tokens"],
        gained.get("vllm:spec_decode_num_accepted_tokens", 0),
        gained.get("vllm:spec_decode_num_draft_tokens", 0),
        gained["vllm:num_preemptions"],
        gained["vllm:prefix_cache_hits"],
        rows.num_rows,
        rows.num_forwards,
        {k: v for k, v in gained.items() if k in COUNTER_NAMES},
    )


def run(name: str) -> Run:
    return _runs(name.replace("small cache", "cached"))[name]


@cache
def _runs(name: str) -> dict[str, Run]:
    """Of one engine."""
    stop_counting_others()
    with running(CONFIGS[name]) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        kinds = (
            f"{type(worker).__module__}.{type(worker).__qualname__}",
            type(scheduler_of(llm)).__qualname__,
        )
        first = second = _one_pass(llm)
        if not CONFIGS[name].prefix_caching:
            return {name: Run(first, second, *kinds)}
        seen = {name: Run(first, _one_pass(llm), *kinds)}
        num_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        with few_blocks(llm, int(num_blocks * SMALL_CACHE)):
            small = Run(_one_pass(llm), _one_pass(llm, **ONE_OUTCOME), *kinds)
        return seen | {name.replace("cached", "small cache"): small}
