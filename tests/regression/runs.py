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
    DraftRowCounter,
    EngineConfig,
    draft_model,
    greedy,
    model_runner,
    prompts,
    running,
    stats,
    stop_counting_others,
    vllm_counters,
)

BATCHES = (1, 8, 24)
SMALL_CACHE = 9 << 20  # bytes: a third of what 24 requests want, so some are preempted
CHUNK = 192  # tokens a step: prompts of up to 1000 tokens come in pieces

CONFIGS = {
    "plain": EngineConfig(),
    "stock": EngineConfig(STOCK),
    "draft_model": EngineConfig(DRAFT_MODEL),
    "draft_model, cached": EngineConfig(
        DRAFT_MODEL, prefix_caching=True, max_num_batched_tokens=CHUNK
    ),
    "draft_model, small cache": EngineConfig(
        DRAFT_MODEL, prefix_caching=True, kv_cache_bytes=SMALL_CACHE
    ),
    "draft_model, padded": EngineConfig(DRAFT_MODEL | {"unpad_inputs": False}),
    "eagle3, stock": EngineConfig(STOCK_EAGLE3),
    "eagle3": EngineConfig(EAGLE3),
    "eagle3, cached": EngineConfig(
        EAGLE3, prefix_caching=True, max_num_batched_tokens=CHUNK
    ),
    "eagle3, small cache": EngineConfig(
        EAGLE3, prefix_caching=True, kv_cache_bytes=SMALL_CACHE
    ),
    "llma": EngineConfig(LLMA),
    "llma, cached": EngineConfig(
        LLMA, prefix_caching=True, max_num_batched_tokens=CHUNK
    ),
    "llma, small cache": EngineConfig(
        LLMA, prefix_caching=True, kv_cache_bytes=SMALL_CACHE
    ),
    "llma, padded": EngineConfig(LLMA | {"unpad_inputs": False}),
}
STOCKS = ("plain", "stock", "eagle3, stock")
OURS = [name for name in CONFIGS if name not in STOCKS]


@dataclass(frozen=True, slots=True)
class Pass:
    """All batches once: what came out and what it cost."""

    token_ids: dict[int, list[list[int]]]  # batch size -> request -> tokens
    num_prompt_tokens: int
    num_accepted_tokens: int  # by vLLM's counter
    num_draft_tokens: int
    num_preemptions: int
    num_cached_tokens: int
    draft_rows: int | None  # by the hook on the draft model
    draft_forwards: int | None
    counts: dict[str, int] | None  # the plugin's, of this pass


@dataclass(frozen=True, slots=True)
class Run:
    first: Pass
    second: Pass  # with prefix caching the same prompts again; preempted ones sampled
    worker: str
    scheduler: str


def batch_prompts(size: int) -> list[str]:
    return list(prompts()[:size])


def _one_pass(llm: Any, **parameters: Any) -> Pass:
    is_ours = hasattr(model_runner(llm), "counters")
    model = draft_model(llm)
    before, counts_before = vllm_counters(llm), stats(llm) if is_ours else {}
    rows = DraftRowCounter(model) if model is not None else None
    token_ids = {
        size: greedy(llm, batch_prompts(size), **parameters) for size in BATCHES
    }
    if rows:
        rows.close()
    after, counts_after = vllm_counters(llm), stats(llm) if is_ours else {}

    def gained(name: str) -> int:
        return int(after.get(name, 0) - before.get(name, 0))

    return Pass(
        token_ids,
        gained("vllm:prompt_tokens"),
        gained("vllm:spec_decode_num_accepted_tokens"),
        gained("vllm:spec_decode_num_draft_tokens"),
        gained("vllm:num_preemptions"),
        gained("vllm:prefix_cache_hits"),
        rows.num_rows if rows else None,
        rows.num_forwards if rows else None,
        {k: v - counts_before[k] for k, v in counts_after.items()} or None,
    )


@cache
def run(name: str) -> Run:
    stop_counting_others()
    with running(CONFIGS[name]) as llm:
        engine_core = llm.llm_engine.engine_core.engine_core
        worker = llm.llm_engine.model_executor.driver_worker.worker
        first = second = _one_pass(llm)
        if CONFIGS[name].prefix_caching:
            is_small = "small cache" in name
            second = _one_pass(llm, **(ONE_OUTCOME if is_small else {}))
        return Run(
            first,
            second,
            f"{type(worker).__module__}.{type(worker).__qualname__}",
            type(engine_core.scheduler).__qualname__,
        )
