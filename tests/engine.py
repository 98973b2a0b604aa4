"""Engines for tests: one at a time, in this process, on the shipped model pair."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

MODELS = Path(
    os.environ.get("EMSSD_TEST_MODELS", Path(__file__).parent.parent / "models")
)
TARGET, DRAFT = str(MODELS / "target"), str(MODELS / "draft")
EAGLE3_HEAD = str(MODELS / "eagle3")
MAX_MODEL_LEN = 1280
NUM_SPECULATIVE_TOKENS = 5

STOCK = {
    "method": "draft_model",
    "model": DRAFT,
    "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
}
FIXED = {"method": "emssd", "draft_length": "fixed"}
DRAFT_MODEL = STOCK | FIXED | {"proposer": "draft_model"}
STOCK_EAGLE3 = STOCK | {"method": "eagle3", "model": EAGLE3_HEAD}
EAGLE3 = DRAFT_MODEL | {"model": EAGLE3_HEAD}
LLMA = FIXED
MIXED = DRAFT_MODEL | {"proposer": "mixed"}
SMALL_BLOCKS = {"block_size": 32}  # the smallest that vLLM's CPU attention takes


@dataclass(frozen=True)
class EngineConfig:
    """What differs between the engines of the suite."""

    speculative_config: dict[str, Any] | None = None
    model: str = TARGET
    dtype: str = "float32"
    prefix_caching: bool = False
    max_num_batched_tokens: int = 2048
    kv_cache_bytes: int = 256 << 20
    max_model_len: int = MAX_MODEL_LEN
    options: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def running(config: EngineConfig) -> Iterator[Any]:
    """A `vllm.LLM`, shut down at the end so that the next can start."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    # vLLM runs the garbage collector a dozen times, over all that was ever imported.
    with patch("gc.collect"):
        llm = LLM(
            config.model,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.prefix_caching,
            kv_cache_memory_bytes=config.kv_cache_bytes,
            speculative_config=config.speculative_config,
            disable_log_stats=False,
            **({"seed": 0, "enforce_eager": True, "max_num_seqs": 32} | config.options),
        )
    try:
        yield llm
    finally:
        with patch("gc.collect"):
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()  # collects once


@cache
def prompts() -> tuple[str, ...]:
    """Held-out real text, of mixed lengths."""
    lines = (MODELS / "prompts.jsonl").read_text().splitlines()
    return tuple(json.loads(line)["prompt"] for line in lines)


def session_tokens(llm: Any, texts: Sequence[str], max_tokens: int) -> list[int]:
    """Greedy tokens of a streaming session with these inputs, which come one by one."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )
    engine, token_ids = llm.llm_engine, []
    for turn, text in enumerate(texts, start=1):
        request = engine.input_processor.process_inputs(
            "session", text, params, supported_tasks=("generate",), resumable=True
        )
        engine.engine_core.add_request(request)
        while len(token_ids) < turn * max_tokens:
            for output in engine.engine_core.get_output().outputs:
                token_ids += output.new_token_ids
    engine.engine_core.abort_requests(["session"])
    engine.engine_core.get_output()  # the worker forgets it
    return token_ids


# At a temperature, yet with one outcome: the sampled path must give the greedy tokens.
ONE_OUTCOME = {"temperature": 0.8, "top_k": 1}


def greedy(
    llm: Any, texts: list[Any], max_tokens: int = 48, **parameters: Any
) -> list[list[int]]:
    """Greedy token ids of each prompt, never stopped early."""
    from vllm import SamplingParams

    wanted = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    params = SamplingParams(**(wanted | parameters))
    outputs = llm.generate(texts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def model_runner(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


@contextlib.contextmanager
def few_blocks(llm: Any, num_blocks: int) -> Iterator[None]:
    """The cache emptied, and all its blocks taken but these: fewer than are wanted, so
    that requests are preempted."""
    assert llm.reset_prefix_cache()
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - num_blocks)
    yield
    pool.free_blocks(taken)


def stats(llm: Any) -> dict[str, int]:
    """The plugin's counters."""
    (counts,) = llm.collective_rpc("emssd_stats")
    return counts


def vllm_counters(llm: Any) -> dict[str, int]:
    """vLLM's own counters of the engine, by name."""
    return {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}


@contextlib.contextmanager
def counting(llm: Any) -> Iterator[dict[str, int]]:
    """What the block adds to vLLM's counters and the plugin's, by name, at its end."""

    def counters() -> dict[str, int]:
        ours = stats(llm) if hasattr(model_runner(llm), "counters") else {}
        return vllm_counters(llm) | ours

    before, gained = counters(), {}
    yield gained
    after = counters()
    gained |= {name: int(n - before.get(name, 0)) for name, n in after.items()}


def stop_counting_others() -> None:
    """vLLM's counters live in the process; start each engine's from zero."""
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    unregister_vllm_metrics()


def draft_model(llm: Any) -> Any:
    """The module, of either runner; None where there is none."""
    runner = model_runner(llm)
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    return getattr(drafter, "model", None)


@dataclass
class DraftRows:
    num_rows: int = 0
    num_forwards: int = 0


@contextlib.contextmanager
def counting_draft_rows(llm: Any) -> Iterator[DraftRows]:
    """Rows fed to the draft model, if there is one, seen from the model itself."""
    rows, model = DraftRows(), draft_model(llm)

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows.num_rows += int(kwargs["input_ids"].shape[0])
        rows.num_forwards += 1

    with contextlib.ExitStack() as stack:
        if model is not None:
            hook = model.register_forward_pre_hook(count, with_kwargs=True)
            stack.callback(hook.remove)
        yield rows
