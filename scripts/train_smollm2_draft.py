#!/usr/bin/env python3
"""Distil a draft model for SmolLM2-135M-Instruct from chats that it wrote.

    scripts/smollm2_chats.py --target MODEL --out CHATS --num-chats 4000
    scripts/smollm2_chats.py --target MODEL --out HELD_OUT --num-chats 96 --held-out
    scripts/train_smollm2_draft.py --target MODEL --chats CHATS --held-out HELD_OUT \\
        --out models/smollm2-draft

The draft model has the target's embedding (frozen, and its output matrix too) and a
few layers of its own that start as copies of the target's. It minimises
KL(target || draft) on the target's answers and, less, on the prompts. The loss is
taken over the words that occur in a batch, the commonest ones and a random sample:
all 49,152 would take most of the time. Goes on with chats that are added meanwhile;
the weights are saved every few minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from chat_shards import Chat, Chats, cut, pad
from fetch_smollm2 import LAYERS_FILE
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from train_pair import build_optimizers, lr_at
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT_SHARE = 0.25  # of a prompt's positions that the loss takes
NUM_RANDOM = 1024  # words of every loss, beside the commonest
HIDDEN_WEIGHT = 0.1  # of the distance between the final hidden states
FIT_CHATS, FIT_TOKENS, RIDGE = 96, 2048, 1e-2
SAVE_SECONDS = 240
SOURCE = "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0"


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
        own.self_attn.load_state_dict(layer.self_attn.state_dict())
        own.input_layernorm.load_state_dict(layer.input_layernorm.state_dict())
        norm = layer.post_attention_layernorm.state_dict()
        own.post_attention_layernorm.load_state_dict(norm)
        copy_neurons(own.mlp, layer.mlp, intermediate_size)
    draft.model.embed_tokens.requires_grad_(False)
    return draft


@torch.no_grad()
def copy_neurons(own: nn.Module, mlp: nn.Module, count: int) -> None:
    norms = [m.weight.norm(dim=d) for m, d in ((mlp.up_proj, 1), (mlp.down_proj, 0))]
    chosen = (norms[0] * norms[1]).topk(count).indices
    own.gate_proj.weight.copy_(mlp.gate_proj.weight[chosen])
    own.up_proj.weight.copy_(mlp.up_proj.weight[chosen])
    own.down_proj.weight.copy_(mlp.down_proj.weight[:, chosen])


@torch.no_grad()
def fit_last_layer(draft: LlamaForCausalLM, chats: list[Chat]) -> None:
    """Solves the last output matrix for the target's final hidden states.

    Copied layers by themselves say something else, confidently: training would first
    have to undo that. Ridge regression on a few chats starts it from a better place.
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
    size = last.mlp.down_proj.in_features
    squares, products = torch.zeros(size, size), 0.0
    for batch in cut(sorted(chats, key=lambda c: len(c.tokens)), FIT_TOKENS):
        tokens, hidden, answer = pad(batch)
        draft.model(input_ids=tokens)
        features, residual = seen["features"][answer], seen["residual"][answer]
        wanted = hidden[answer].float() / draft.model.norm.weight
        squares += features.T @ features
        products += features.T @ (wanted - residual)
    for hook in hooks:
        hook.remove()
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    last.mlp.down_proj.weight.copy_(torch.linalg.solve(squares, products).T)


# ---------------------------------------------------------------- training


class Distillation:
    """KL of the draft model to the target, over some of the words."""

    def __init__(self, draft: LlamaForCausalLM, common: torch.Tensor) -> None:
        self._draft, self._common = draft, common
        self._half = draft.model.embed_tokens.weight.detach().bfloat16()

    def loss(self, batch: list[Chat]) -> torch.Tensor:
        tokens, hidden, answer = pad(batch)
        own = self._draft.model(input_ids=tokens).last_hidden_state
        lengths = torch.tensor([len(chat.tokens) for chat in batch])
        real = torch.arange(tokens.shape[1])[None] < lengths[:, None]
        taken = answer | (real & (torch.rand(tokens.shape) < PROMPT_SHARE))
        own, wanted = own[taken], hidden[taken]
        words = torch.cat(
            [
                tokens.flatten(),
                self._common,
                torch.randint(len(self._half), (NUM_RANDOM,)),
            ]
        ).unique()
        matrix = self._half[words].T.contiguous()
        target = (wanted @ matrix).float().log_softmax(-1)
        draft = (own.bfloat16() @ matrix).float().log_softmax(-1)
        kl = functional.kl_div(draft, target, reduction="batchmean", log_target=True)
        distance = functional.mse_loss(own.float(), wanted.float())
        return kl + HIDDEN_WEIGHT * distance / wanted.float().pow(2).mean()


@torch.no_grad()
def agreement(draft: LlamaForCausalLM, chats: list[Chat]) -> dict[str, float]:
    """On answers, after the target's own tokens: how often greedy and sampled drafts
    would be accepted."""
    half = draft.model.embed_tokens.weight.bfloat16()
    same, overlap, total = 0, 0.0, 0
    for batch in cut(sorted(chats, key=lambda c: len(c.tokens)), 4096):
        tokens, hidden, answer = pad(batch)
        with torch.autocast("cpu", torch.bfloat16):
            own = draft.model(input_ids=tokens).last_hidden_state[answer].bfloat16()
        p, q = (hidden[answer] @ half.T).float(), (own @ half.T).float()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        overlap += torch.minimum(p.softmax(-1), q.softmax(-1)).sum().item()
        total += len(p)
    return {"greedy_agreement": same / total, "sampled_acceptance": overlap / total}


def own_weights(draft: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """All but the embedding, which is the target's."""
    return {
        name: weight.detach().bfloat16().contiguous()
        for name, weight in draft.state_dict().items()
        if name not in ("model.embed_tokens.weight", "lm_head.weight")
    }


def save(draft: LlamaForCausalLM, record: dict[str, object], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "layers.tmp"
    save_file(own_weights(draft), unfinished)
    unfinished.rename(folder / LAYERS_FILE)
    draft.config.architectures = ["LlamaForCausalLM"]
    draft.config.dtype = torch.bfloat16
    draft.config.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--target", type=Path, required=True)
    add("--chats", type=Path, required=True)
    add("--held-out", type=Path, required=True, help="chats to measure agreement on")
    add("--out", type=Path, required=True)
    add("--layers", default="0,1", help="of the target, to start from")
    add("--intermediate-size", type=int, default=1024, help="neurons of each MLP")
    add("--steps", type=int, default=600)
    add("--minutes", type=float, default=60, help="stop then, whatever the steps")
    add("--batch-tokens", type=int, default=4096)
    add("--go-on", action="store_true", help="from the weights in --out")
    add("--lr-scale", type=float, default=0.3, help="1: as from scratch")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    target = LlamaForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    layers = [int(number) for number in args.layers.split(",")]
    draft = copy_layers(target, layers, args.intermediate_size)
    share = draft.num_parameters() / target.num_parameters()
    print(f"{share:.4f} of the target's parameters", flush=True)
    chats, held_out = Chats(args.chats), Chats(args.held_out)
    chats.load_new()
    held_out.load_new()
    if args.go_on:
        draft.load_state_dict(load_file(args.out / LAYERS_FILE), strict=False)
    else:
        fit_last_layer(draft, chats.chats[:FIT_CHATS])
    distillation = Distillation(draft, chats.common_words(target.config.vocab_size))
    optimizers = build_optimizers(draft, args.lr_scale)
    groups = [(g, g["lr"]) for o in optimizers for g in o.param_groups]
    record: dict[str, object] = {"derived_from": SOURCE, "command": " ".join(sys.argv)}
    record |= {"torch": torch.__version__, "share_of_target": share}
    start = saved = time.monotonic()
    done, smooth = 0, math.nan
    for step, batch in enumerate(chats.batches(args.batch_tokens, rng)):
        elapsed = time.monotonic() - start
        progress = max(step / args.steps, elapsed / (60 * args.minutes))
        if progress >= 1 or time.monotonic() - saved > SAVE_SECONDS:
            saved = time.monotonic()
            record |= {"steps": step, "seconds": round(elapsed)}
            record |= {"tokens_trained_on": done, "tokens": chats.num_tokens}
            record["held_out"] = agreement(draft, held_out.chats)
            save(draft, record, args.out)
            print(json.dumps(record["held_out"]), flush=True)
        if progress >= 1:
            break
        for group, lr in groups:
            group["lr"] = lr * max(1e-3, lr_at(progress))
        with torch.autocast("cpu", torch.bfloat16):
            loss = distillation.loss(batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done += sum(len(chat.tokens) for chat in batch)
        value = loss.item()
        smooth = value if math.isnan(smooth) else 0.95 * smooth + 0.05 * value
        if step % 10 == 0:
            print(f"{elapsed:.0f} s, step {step}, loss {smooth:.3f}", flush=True)


if __name__ == "__main__":
    main()
