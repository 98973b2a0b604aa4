"""Prompts computed by one engine and decoded by another, over vLLM's example connector.

It saves and loads the K/V of every layer, the draft model's too, so the engine that
computes prompts must feed them to its draft model though no request wants drafts there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import (
    DRAFT_MODEL,
    EAGLE3,
    STOCK,
    EngineConfig,
    prompts,
    running,
    stats,
    vllm_counters,
)

BLOCK_SIZE = 32
NUM_PROMPT_TOKENS = (40, 70, 100, 130)  # each more than a block


def transfer(folder: Path) -> dict[str, Any]:
    from vllm.config import KVTransferConfig

    return {
        "block_size": BLOCK_SIZE,
        "kv_transfer_config": KVTransferConfig(
            kv_connector="ExampleConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"shared_storage_path": str(folder)},
        ),
    }


def generate(llm: Any, max_tokens: int) -> list[Any]:
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    texts = [
        {"prompt_token_ids": (tokenizer.encode(text) * 9)[:length]}
        for text, length in zip(prompts(), NUM_PROMPT_TOKENS, strict=False)
    ]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return llm.generate(texts, params, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@cache
def plain_tokens() -> list[list[int]]:
    with running(EngineConfig()) as llm:
        return tokens(generate(llm, max_tokens=24))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """K/V by prompt and layer."""
    return {
        str(path.relative_to(folder)): load_file(path)["kv_cache"]
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def saved_by_stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("stock")
    with running(EngineConfig(STOCK, options=transfer(folder))) as llm:
        generate(llm, max_tokens=1)
    return saved(folder)


@pytest.mark.parametrize(
    "speculative_config",
    [
        DRAFT_MODEL,
        pytest.param(
            DRAFT_MODEL | {"proposer": "mixed", "draft_length": "auto"},
            marks=pytest.mark.slow,
            id="mixed, auto",
        ),
    ],
)
def test_prefill_on_one_engine_and_decode_on_another(
    speculative_config: dict[str, Any],
    saved_by_stock: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    config = EngineConfig(speculative_config, options=transfer(tmp_path))
    with running(config) as llm:
        first = tokens(generate(llm, max_tokens=1))
        counts = stats(llm)
    assert first == [ids[:1] for ids in plain_tokens()]
    assert counts["num_draft_tokens"] == 0
    assert counts["num_draft_rows"] == sum(NUM_PROMPT_TOKENS)

    ours = saved(tmp_path)
    assert ours.keys() == saved_by_stock.keys()
    assert any("draft_model" in name for name in ours)
    for name, kv in ours.items():
        torch.testing.assert_close(kv, saved_by_stock[name], atol=1e-4, rtol=1e-4)

    with running(config) as llm:
        outputs = generate(llm, max_tokens=24)
        accepted = vllm_counters(llm)["vllm:spec_decode_num_accepted_tokens"]
    assert tokens(outputs) == plain_tokens()
    assert accepted > 0
    cached = [output.num_cached_tokens for output in outputs]
    assert cached == [(n - 1) // BLOCK_SIZE * BLOCK_SIZE for n in NUM_PROMPT_TOKENS]


@pytest.mark.slow
def test_a_head_begins_anew_behind_prompts_of_another_engine(tmp_path: Path) -> None:
    """Whose hidden states the connector does not bring."""
    config = EngineConfig(EAGLE3, options=transfer(tmp_path))
    with running(config) as llm:
        generate(llm, max_tokens=1)
    with running(config) as llm:
        outputs, counts = generate(llm, max_tokens=24), stats(llm)
    assert tokens(outputs) == plain_tokens()
    assert all(output.num_cached_tokens > 0 for output in outputs)
    assert counts["num_draft_restarts"] == len(outputs)
    assert counts["num_accepted_tokens"] > 0
