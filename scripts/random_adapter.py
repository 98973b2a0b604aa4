"""A LoRA adapter with random weights: it changes what a model says, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

RANK = 8
SCALE = 0.05  # of the weights: enough to turn tokens, too little to lose all sense
MODULES = ("q_proj", "o_proj")


def make_adapter(model: str, folder: Path, seed: int) -> None:
    """Write one for a Llama-like model, in the format of PEFT."""
    config = AutoConfig.from_pretrained(model)
    heads_size = config.num_attention_heads * config.head_dim
    sizes = {
        "q_proj": (config.hidden_size, heads_size),
        "o_proj": (heads_size, config.hidden_size),
    }
    dice = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config.num_hidden_layers):
        for module in MODULES:
            size_in, size_out = sizes[module]
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, shape in (("A", (RANK, size_in)), ("B", (size_out, RANK))):
                values = torch.randn(shape, generator=dice) * SCALE
                weights[f"{name}.lora_{part}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(MODULES),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
