#!/usr/bin/env python3
"""Make a trained Llama larger without changing its function.

    scripts/grow_model.py models/target /tmp/grown --hidden-size 1024 --num-layers 16

A small trained pair has the acceptance of real text, but a small target costs hardly
more than its drafter. Grown, it costs what a real one costs and says the same:

- depth: layers whose attention and MLP outputs are zero,
- width: zero-padded, with RMSNorm's scale and epsilon compensated,
- heads and MLP width: extra ones whose output is zero.

Checks that the float32 logits agree before it writes anything.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

TOLERANCE = 1e-3  # float32 logits; sums over padded width run in another order
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def grown_config(small: LlamaConfig, args: argparse.Namespace) -> LlamaConfig:
    head_dim = small.head_dim
    num_heads = args.hidden_size // head_dim
    group = max(
        args.query_group, small.num_attention_heads // small.num_key_value_heads
    )
    width_ratio = small.hidden_size / args.hidden_size
    config = LlamaConfig.from_dict(small.to_dict())
    config.hidden_size = args.hidden_size
    config.num_hidden_layers = args.num_layers
    config.num_attention_heads = num_heads
    config.num_key_value_heads = num_heads // group
    config.intermediate_size = args.intermediate_size or 11 * args.hidden_size // 4
    config.rms_norm_eps = small.rms_norm_eps * width_ratio
    return config


def check_sizes(small: LlamaConfig, large: LlamaConfig) -> None:
    """Raise ValueError where the small model does not fit into the large one."""
    for name in (
        "hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size",
    ):  # fmt: skip
        if getattr(large, name) < getattr(small, name):
            raise ValueError(
                f"{name} would shrink from {getattr(small, name)} to "
                f"{getattr(large, name)}; ask for a larger --hidden-size, --num-layers "
                "or --intermediate-size"
            )
    if large.num_attention_heads % large.num_key_value_heads:
        raise ValueError("--query-group must divide hidden_size / head_dim")


def head_rows(small: LlamaConfig, large: LlamaConfig, num_heads: int) -> torch.Tensor:
    """Rows of the large projection that hold the small one's heads.

    A query head must stay with its key head: heads go to the start of their group.
    """
    small_group = num_heads // small.num_key_value_heads
    is_query = num_heads == small.num_attention_heads
    large_group = large.num_attention_heads // large.num_key_value_heads
    group = large_group if is_query else 1
    heads = torch.tensor(
        [
            (head // small_group) * group + head % small_group
            for head in range(num_heads)
        ]
    )
    return (heads[:, None] * small.head_dim + torch.arange(small.head_dim)).flatten()


@torch.no_grad()
def copy_norm(large: nn.Module, small: nn.Module) -> None:
    """The mean square falls with the padding; the scale makes up for it."""
    width = len(small.weight)
    large.weight.zero_()
    large.weight[:width] = small.weight * (width / len(large.weight)) ** 0.5


@torch.no_grad()
def widen(large: torch.Tensor, small: torch.Tensor) -> None:
    """Zeros in the columns that the small one lacks."""
    large.zero_()
    large[:, : small.shape[1]] = small


@torch.no_grad()
def place(large: nn.Linear, small: nn.Linear, rows: object, columns: object) -> None:
    """Put the small weights into a zeroed large matrix. Both are [out, in]."""
    large.weight.zero_()
    inner = torch.zeros_like(large.weight[rows])
    inner[:, columns] = small.weight
    large.weight[rows] = inner


def copy_layer(
    large: nn.Module, small: nn.Module, wide: LlamaConfig, slim: LlamaConfig
) -> None:
    hidden, inner = slice(slim.hidden_size), slice(slim.intermediate_size)
    queries = head_rows(slim, wide, slim.num_attention_heads)
    keys = head_rows(slim, wide, slim.num_key_value_heads)
    place(large.self_attn.q_proj, small.self_attn.q_proj, queries, hidden)
    place(large.self_attn.k_proj, small.self_attn.k_proj, keys, hidden)
    place(large.self_attn.v_proj, small.self_attn.v_proj, keys, hidden)
    place(large.self_attn.o_proj, small.self_attn.o_proj, hidden, queries)
    place(large.mlp.gate_proj, small.mlp.gate_proj, inner, hidden)
    place(large.mlp.up_proj, small.mlp.up_proj, inner, hidden)
    place(large.mlp.down_proj, small.mlp.down_proj, hidden, inner)
    copy_norm(large.input_layernorm, small.input_layernorm)
    copy_norm(large.post_attention_layernorm, small.post_attention_layernorm)


@torch.no_grad()
def grow(small: LlamaForCausalLM, config: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with small.device:
        large = LlamaForCausalLM(config)
    slim = small.config
    widen(large.model.embed_tokens.weight, small.model.embed_tokens.weight)
    if not slim.tie_word_embeddings:
        widen(large.lm_head.weight, small.lm_head.weight)
    copy_norm(large.model.norm, small.model.norm)
    for i, layer in enumerate(large.model.layers):
        if i < slim.num_hidden_layers:
            copy_layer(layer, small.model.layers[i], config, slim)
        else:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return large


@torch.no_grad()
def largest_difference(small: LlamaForCausalLM, large: LlamaForCausalLM) -> float:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 128)
    ids = torch.randint(small.config.vocab_size, shape, generator=generator)
    ids = ids.to(small.device)
    return float((small(ids).logits - large(ids).logits).abs().max())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--intermediate-size", type=int)
    parser.add_argument("--query-group", type=int, default=4)
    parser.add_argument("--device", default="cpu", help="cuda is quicker from 1B on")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    small = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    small = small.to(args.device).eval()
    config = grown_config(small.config, args)
    check_sizes(small.config, config)
    large = grow(small, config).eval()
    difference = largest_difference(small, large)
    if not difference < TOLERANCE:
        raise SystemExit(f"logits differ by {difference}; nothing written")
    large.to(torch.bfloat16).save_pretrained(args.output)
    for name in TOKENIZER_FILES:
        shutil.copy(args.model / name, args.output / name)
    size = large.num_parameters() / 1e6
    print(f"{size:.0f}M parameters in {args.output}, logits within {difference:.1e}")


if __name__ == "__main__":
    main()
