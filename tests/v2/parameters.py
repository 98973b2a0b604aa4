"""Every sampling parameter on the V2 runner under the interpreter, plain and emssd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine import (
    DRAFT_MODEL,
    EAGLE3,
    LLMA,
    EngineConfig,
    counting,
    prompts,
    running,
    stop_counting_others,
)
from tests.lossless.engines import REASONING, sample
from tests.lossless.test_greedy import CASES, NONE, shortened
from tests.v2 import interpreter
from tests.v2.runs import SteeredCosts, asynchronous

SMALL = {
    "max_model_len": 192,
    "kv_cache_bytes": 16 << 20,
    "options": {"block_size": 32} | REASONING["options"],
}
FIXED = DRAFT_MODEL | {"num_speculative_tokens": 3}
ENGINES = {
    "plain": EngineConfig(**SMALL),
    "fixed": EngineConfig(FIXED, **SMALL),
    "one draft": EngineConfig(FIXED | {"num_speculative_tokens": 1}, **SMALL),
    "async": EngineConfig(FIXED, **asynchronous(SMALL)),
    "auto": EngineConfig(FIXED | {"draft_length": "auto"}, **SMALL),
    "eagle3": EngineConfig(EAGLE3 | {"num_speculative_tokens": 3}, **SMALL),
    "copying": EngineConfig(LLMA | {"check_length": 1}, **SMALL),
}


def arrangements(case: str) -> dict[str, list[SamplingParams]]:
    """The case for all of four requests, for one alone, and beside requests that use
    none."""
    params = CASES[case]
    each = params if isinstance(params, list) else [params] * 4
    each = [shortened(p, 14) for p in each[:4]]
    beside = [p if i % 2 else shortened(NONE, 14) for i, p in enumerate(each)]
    return {"all": each, "alone": each[:1], "beside": beside}


@contextlib.contextmanager
def recorded_paths() -> Iterator[set[str]]:
    """As `test_greedy.recorded_paths`, of the V2 runner's samplers."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    from vllm_emssd.integration.v2.rejection_sampler import UnpadRejectionSamplerV2

    paths: set[str] = set()
    plain, verify = Sampler.__call__, UnpadRejectionSamplerV2.__call__

    def sample_plainly(self: Any, *args: Any, **kwargs: Any) -> Any:
        paths.add("no drafts")
        return plain(self, *args, **kwargs)

    def verify_drafts(self: Any, logits: Any, input_batch: Any, *args: Any) -> Any:
        output = verify(self, logits, input_batch, *args)
        num_drafts = input_batch.cu_num_logits[1:] - input_batch.cu_num_logits[:-1] - 1
        has_drafts = num_drafts > 0
        if (has_drafts & (output.num_sampled == num_drafts + 1)).any():
            paths.add("behind all drafts")
        if (has_drafts & (output.num_sampled <= num_drafts)).any():
            paths.add("rejected draft")
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "__call__", sample_plainly)
        patch.setattr(UnpadRejectionSamplerV2, "__call__", verify_drafts)
        yield paths


def run_case(llm: Any, params: list[SamplingParams]) -> dict[str, Any]:
    texts = [text[: 100 + 30 * i] for i, text in enumerate(prompts()[: len(params)])]
    with recorded_paths() as paths, counting(llm) as gained:
        out = sample(llm, texts, params)
    return {
        "token_ids": out.token_ids,
        "texts": out.texts,
        "finish_reasons": out.finish_reasons,
        "logprobs": [
            [sorted(at.items()) for at in positions] for positions in out.logprobs
        ],
        # By our counters: with async scheduling vLLM's count what it scheduled ahead.
        "num_draft_tokens": gained.get("num_draft_tokens", 0),
        "num_accepted_tokens": out.num_accepted_tokens,
        "paths": sorted(paths),
    }


def run_all() -> dict[str, Any]:
    interpreter.filter_by_torch()
    seen: dict[str, Any] = {}
    for name, config in ENGINES.items():
        stop_counting_others()
        interpreter.schedule_asynchronously(name == "async")
        with running(config) as llm, contextlib.ExitStack() as stack:
            if name == "auto":  # whose lengths would all be 0 by costs measured here
                stack.enter_context(SteeredCosts(llm)).draw()
            for case in CASES:
                for arrangement, params in arrangements(case).items():
                    key = f"{name}: {case}, {arrangement}"
                    seen[key] = run_case(llm, params)
    return seen
