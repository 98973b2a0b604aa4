"""The demo's chat model with its EAGLE-3 head: plain decoding's tokens, and a gain."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine import (
    MODELS,
    EngineConfig,
    running,
    stop_counting_others,
    vllm_counters,
)
from vllm_emssd.bench import smollm2
from vllm_emssd.bench.workloads import WorkloadOptions, load_workload

pytestmark = pytest.mark.slow

NUM_PROMPTS, MAX_TOKENS = 6, 48
MIN_ACCEPTED = 0.1  # of the drafts; far below what was measured


@pytest.fixture(scope="module")
def pair() -> tuple[str, str]:
    try:
        return str(smollm2.fetch()), str(MODELS / "smollm2-eagle3")
    except smollm2.FetchError as error:
        pytest.skip(str(error))


def decode(
    model: str, speculative_config: dict[str, Any] | None
) -> tuple[list[list[int]], dict[str, int]]:
    """Tokens by prompt, and vLLM's counters."""
    stop_counting_others()
    with running(EngineConfig(speculative_config, model=model)) as llm:
        options = WorkloadOptions(MAX_TOKENS, 320)
        workload = load_workload("chats", llm.get_tokenizer(), options, NUM_PROMPTS)
        prompts = [{"prompt_token_ids": r.prompt_token_ids} for r in workload.requests]
        sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        counters = vllm_counters(llm)
    return [list(output.outputs[0].token_ids) for output in outputs], counters


@pytest.mark.parametrize("lengths", ["fixed", "auto"])
def test_chats_are_plain_decodings(pair: tuple[str, str], lengths: str) -> None:
    target, draft = pair
    plain, _ = decode(target, None)
    config = {
        "method": "emssd",
        "model": draft,
        "num_speculative_tokens": 3,
        "draft_length": lengths,
    }
    tokens, counters = decode(target, config)
    assert tokens == plain
    if lengths == "fixed":
        num_drafts = counters["vllm:spec_decode_num_draft_tokens"]
        num_accepted = counters["vllm:spec_decode_num_accepted_tokens"]
        assert num_accepted > MIN_ACCEPTED * num_drafts > 0
