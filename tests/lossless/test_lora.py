"""Greedy output with a LoRA adapter is that of plain decoding with it.

All requests of a batch have the adapter: vLLM 0.32 on a CPU gives requests without one
the weights of another request's, speculation or not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.engine import (
    DRAFT_MODEL,
    EAGLE3,
    LLMA,
    TARGET,
    EngineConfig,
    running,
    stop_counting_others,
    vllm_counters,
)
from tests.lossless.engines import texts

pytestmark = pytest.mark.slow
RANK = 8
SCALE = 0.05  # of the random weights: enough to turn tokens
METHODS = {
    "draft_model": DRAFT_MODEL,
    "auto": DRAFT_MODEL | {"draft_length": "auto"},
    "eagle3": EAGLE3,
    "llma": LLMA,
}


def write_adapter(folder: Path, seed: int = 1) -> None:
    """Random weights for the attention's output and the LM head, in PEFT's format."""
    config = AutoConfig.from_pretrained(TARGET)
    num_attended = config.num_attention_heads * config.head_dim
    sizes = {
        f"model.layers.{layer}.self_attn.o_proj": (num_attended, config.hidden_size)
        for layer in range(config.num_hidden_layers)
    }
    sizes["lm_head"] = config.hidden_size, config.vocab_size
    dice = torch.Generator().manual_seed(seed)
    weights = {
        f"base_model.model.{name}.lora_{part}.weight": (
            torch.randn(shape, generator=dice) * SCALE
        )
        for name, (num_inputs, num_outputs) in sizes.items()
        for part, shape in (("A", (RANK, num_inputs)), ("B", (num_outputs, RANK)))
    }
    save_file(weights, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": TARGET,
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["o_proj", "lm_head"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder)
    return LoRARequest("random", 1, str(folder))


def _tokens(
    speculative: dict[str, Any] | None, adapter: LoRARequest | None
) -> tuple[list[list[int]], int]:
    """Greedy tokens of eight requests, and how many drafts were accepted."""
    stop_counting_others()
    config = EngineConfig(
        speculative, options={"enable_lora": True, "max_lora_rank": RANK}
    )
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with running(config) as llm:
        outputs = llm.generate(texts(8), params, use_tqdm=False, lora_request=adapter)
        accepted = vllm_counters(llm).get("vllm:spec_decode_num_accepted_tokens", 0)
    return [list(output.outputs[0].token_ids) for output in outputs], int(accepted)


@pytest.fixture(scope="module")
def plain(adapter: LoRARequest) -> list[list[int]]:
    tokens, _ = _tokens(None, adapter)
    without, _ = _tokens(None, None)
    assert tokens != without  # the adapter changes what the model says
    return tokens


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_plain_decoding(
    plain: list[list[int]], adapter: LoRARequest, method: str
) -> None:
    tokens, num_accepted = _tokens(METHODS[method], adapter)
    assert tokens == plain
    assert num_accepted > 0
