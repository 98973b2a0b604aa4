"""Make a trained Llama larger without changing its function.

    python -m models.make.grow_model models/target /tmp/grown --hidden-size 1024 \\
        --num-layers 16

A small trained pair has the acceptance of real text, but a small target costs hardly
more than its draft model. Grown, it costs what a real one costs and says the same:

- depth: layers whose attention and MLP outputs are zero,
- width: padded with zeros, and RMSNorm's scale and epsilon make up for it,
- heads and MLP width: further ones whose output is zero.

The float32 logits are compared before anything is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOLERANCE = 1e-3  # float32 logits; sums over padded width run in another order


def grown_config(small: LlamaConfig, arguments: argparse.Namespace) -> LlamaConfig:
    """Raises ValueError where the small model does not fit into the large one."""
    wide = LlamaConfig.from_dict(small.to_dict())
    group = small.num_attention_heads // small.num_key_value_heads
    group = max(arguments.query_group, group)
    wide.hidden_size = arguments.hidden_size
    wide.num_hidden_layers = arguments.num_layers
    wide.num_attention_heads = arguments.hidden_size // small.head_dim
    wide.num_key_value_heads = wide.num_attention_heads // group
    wide.intermediate_size = (
        arguments.intermediate_size or 11 * arguments.hidden_size // 4
    )
    wide.rms_norm_eps = small.rms_norm_eps * small.hidden_size / wide.hidden_size
    for name in (
        "hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size",
    ):  # fmt: skip
        if getattr(wide, name) < getattr(small, name):
            raise ValueError(
                f"{name} would shrink from {getattr(small, name)} to "
                f"{getattr(wide, name)}; ask for a larger --hidden-size, --num-layers "
                "or --intermediate-size"
            )
    if wide.num_attention_heads % wide.num_key_value_heads:
        raise ValueError("--query-group must divide hidden_size / head_dim")
    return wide


def rows_of_heads(num_heads: int, group: int, wide_group: int, size: int) -> list[int]:
    """Rows of the large projection that hold the small one's heads.

    Query heads stay with their key head: they are the first ones of their group.
    """
    heads = [i // group * wide_group + i % group for i in range(num_heads)]
    return [head * size + row for head in heads for row in range(size)]


@torch.no_grad()
def grow(small: LlamaForCausalLM, config: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with small.device:
        large = LlamaForCausalLM(config)
    for layer in large.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    slim = small.config
    num_keys = slim.num_key_value_heads
    group = slim.num_attention_heads // num_keys
    wide_group = config.num_attention_heads // config.num_key_value_heads
    queries = rows_of_heads(num_keys * group, group, wide_group, slim.head_dim)
    rows = {"q_proj": queries}  # all other matrices begin at the first row and column
    columns = {"o_proj": queries}
    wide = large.state_dict()
    for name, weight in small.state_dict().items():
        kind, into = name.split(".")[-2], wide[name].zero_()
        if weight.ndim == 1:  # a norm: the mean square falls with the padding
            into[: len(weight)] = weight * (len(weight) / len(into)) ** 0.5
            continue
        row = torch.tensor(rows.get(kind, range(weight.shape[0])))
        column = torch.tensor(columns.get(kind, range(weight.shape[1])))
        into[row[:, None], column] = weight
    return large


@torch.no_grad()
def largest_difference(small: LlamaForCausalLM, large: LlamaForCausalLM) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(small.config.vocab_size, (4, 128), generator=generator)
    ids = ids.to(small.device)
    return float((small(ids).logits - large(ids).logits).abs().max())


def parse_arguments() -> argparse.Namespace:
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
    arguments = parse_arguments()
    small = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    small = small.to(arguments.device).eval()
    large = grow(small, grown_config(small.config, arguments)).eval()
    difference = largest_difference(small, large)
    if not difference < TOLERANCE:
        raise SystemExit(f"logits differ by {difference}; nothing written")
    large.to(torch.bfloat16).save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)
    size = large.num_parameters() / 1e6
    print(
        f"{size:.0f}M parameters in {arguments.output}; logits differ {difference:.1e}"
    )


if __name__ == "__main__":
    main()
