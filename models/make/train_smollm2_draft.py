"""Distil a draft model for SmolLM2-135M-Instruct from chats that it wrote.

    python -m models.make.write_chats --target MODEL --out chats.jsonl
    python -m models.make.write_chats --target MODEL --out held-out.jsonl \\
        --num-chats 96 --held-out
    python -m models.make.train_smollm2_draft --target MODEL --chats chats.jsonl \\
        --held-out held-out.jsonl --out models/smollm2-draft

The draft model has the target's embedding (frozen, and the output matrix too) and a few
of its layers, with fewer neurons, that are trained on: KL(target || draft) on the
target's answers and on some positions of the prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import LengthGroupedSampler

from models.make.distillation import Batch, acceptance, distillation_loss, train
from scripts.fetch_smollm2 import EMBEDDING, LAYERS_FILE

MAX_TOKENS = 512  # of a chat
NUM_FITTED, RIDGE = 96, 1e-2  # chats that the last layer is fitted to
PROMPT_SHARE = 0.25  # of a prompt's positions that are trained on
SOURCE = "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0"

Chat = dict[str, Any]


def copy_layers(
    target: LlamaForCausalLM, layers: list[int], intermediate_size: int
) -> LlamaForCausalLM:
    """Some of the target's layers, with the strongest neurons of their MLPs."""
    config = LlamaConfig.from_dict(target.config.to_dict())
    config.num_hidden_layers = len(layers)
    config.intermediate_size = intermediate_size
    draft = LlamaForCausalLM(config)
    draft.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(target.model.norm.state_dict())
    for own, number in zip(draft.model.layers, layers, strict=True):
        layer = target.model.layers[number]
        copy_neurons(own.mlp, layer.mlp)
        own.load_state_dict(layer.state_dict() | own.mlp.state_dict(prefix="mlp."))
    draft.model.embed_tokens.requires_grad_(False)
    return draft.float()


@torch.no_grad()
def copy_neurons(own: nn.Module, mlp: nn.Module) -> None:
    strength = mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
    chosen = strength.topk(own.intermediate_size).indices
    own.gate_proj.weight.copy_(mlp.gate_proj.weight[chosen])
    own.up_proj.weight.copy_(mlp.up_proj.weight[chosen])
    own.down_proj.weight.copy_(mlp.down_proj.weight[:, chosen])


@torch.no_grad()
def fit_last_layer(
    draft: LlamaForCausalLM, target: LlamaForCausalLM, batches: Iterable[Batch]
) -> None:
    """Solves the last output matrix for the target's final hidden states.

    Copied layers alone are sure of wrong tokens, which training would have to undo
    first. Ridge regression on a few chats starts it from a better place.
    """
    last, seen = draft.model.layers[-1], {}
    hooks = [
        last.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs: seen.update(features=inputs[0])
        ),
        last.post_attention_layernorm.register_forward_pre_hook(
            lambda _, inputs: seen.update(residual=inputs[0])
        ),
    ]
    squares, products = 0.0, 0.0
    for token_ids, counts in batches:
        draft.model(input_ids=token_ids)
        hidden = target.model(input_ids=token_ids).last_hidden_state[counts].float()
        features, residual = seen["features"][counts], seen["residual"][counts]
        squares += features.T @ features
        products += features.T @ (hidden / draft.model.norm.weight - residual)
    for hook in hooks:
        hook.remove()
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    last.mlp.down_proj.weight.copy_(torch.linalg.solve(squares, products).T)


# ---------------------------------------------------------------- chats


def read_chats(path: Path) -> list[Chat]:
    chats = [json.loads(line) for line in path.read_text().splitlines()]
    return [chat for chat in chats if chat["num_prompt_tokens"] < MAX_TOKENS]


def make_batch(chats: list[Chat], prompt_share: float = 0.0) -> Batch:
    """Padded on the right, where causal attention never looks.

    What counts are the positions that predict an answer's tokens, and at random some
    of those that predict a prompt's.
    """
    rows = [torch.tensor(chat["token_ids"][:MAX_TOKENS]) for chat in chats]
    token_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    counts = torch.rand(token_ids.shape) < prompt_share
    for i, (chat, row) in enumerate(zip(chats, rows, strict=True)):
        counts[i, chat["num_prompt_tokens"] - 1 : len(row) - 1] = True
        counts[i, len(row) - 1 :] = False
    return token_ids, counts


def in_order(chats: list[Chat], size: int, prompt_share: float = 0.0) -> list[Batch]:
    """Each chat once."""
    starts = range(0, len(chats), size)
    return [make_batch(chats[i : i + size], prompt_share) for i in starts]


def shuffled(chats: list[Chat], size: int) -> Iterator[Batch]:
    """Of chats of about one length, in random order, without end."""
    lengths = [len(chat["token_ids"]) for chat in chats]
    sampler = LengthGroupedSampler(size, lengths=lengths)
    loader = DataLoader(chats, size, sampler=sampler, collate_fn=list)
    while True:
        yield from (make_batch(some, PROMPT_SHARE) for some in loader)


# ---------------------------------------------------------------- the command


def save(draft: LlamaForCausalLM, record: dict[str, Any], folder: Path) -> None:
    """Its own weights: all but the embedding, which is the target's."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.bfloat16().contiguous()
        for name, weight in draft.state_dict().items()
        if name not in (EMBEDDING, "lm_head.weight")
    }
    save_file(weights, folder / LAYERS_FILE)
    draft.config.architectures = ["LlamaForCausalLM"]
    draft.config.dtype = torch.bfloat16
    draft.config.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--target", required=True)
    add("--chats", type=Path, required=True)
    add("--held-out", type=Path, required=True, help="chats to measure acceptance on")
    add("--out", type=Path, required=True)
    add("--layers", type=int, nargs="+", default=[0, 1], help="of the target's")
    add("--intermediate-size", type=int, default=1024, help="neurons of each MLP")
    add("--steps", type=int, default=600)
    add("--batch-size", type=int, default=8, help="chats of a step")
    add("--go-on", action="store_true", help="from the weights in --out")
    add("--lr-scale", type=float, default=0.3, help="1: as from scratch")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(1)
    target = LlamaForCausalLM.from_pretrained(arguments.target, dtype=torch.bfloat16)
    draft = copy_layers(target, arguments.layers, arguments.intermediate_size)
    chats, size = read_chats(arguments.chats), arguments.batch_size
    if arguments.go_on:
        draft.load_state_dict(load_file(arguments.out / LAYERS_FILE), strict=False)
    else:
        fit_last_layer(draft, target, in_order(chats[:NUM_FITTED], size))
    loss, lr_scale = distillation_loss(draft, target), arguments.lr_scale
    train(draft, loss, shuffled(chats, size), arguments.steps, lr_scale)
    measured = in_order(read_chats(arguments.held_out), size)
    record = {
        "derived_from": SOURCE,
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "share_of_target": draft.num_parameters() / target.num_parameters(),
        "num_chats": len(chats),
        "held_out": acceptance(draft, target, measured),
    }
    save(draft, record, arguments.out)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
