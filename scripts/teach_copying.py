#!/usr/bin/env python3
"""Teach the shipped target to copy from its context, as larger models do.

    scripts/teach_copying.py --out /tmp/copying-target --tokens 1e6

The shipped target is too small, and was trained on too short windows, to repeat a text
it has just read: it is no model for copy-heavy work. This goes on training it, on the
same text, in windows that say a passage again and again with one word changed each
time. What it is like to copy then comes from real text: where a changed word occurs,
or where the model errs, a copied draft is rejected.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from train_pair import collect_documents, encode, save, train
from transformers import LlamaForCausalLM

REPO = Path(__file__).parent.parent
WINDOW = 512
BATCH_TOKENS = 4096
PASSAGE_TOKENS = (24, WINDOW // 2)
LR_SCALE = 0.5  # of the training from scratch
PLAIN_SHARE = 0.2  # windows left as they are, so that nothing is forgotten
NOISE_SHARE = 0.2  # windows of shuffled tokens, which only copying can predict


def with_copies(windows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Windows whose first tokens are said again until they are full.

    windows: [num_windows, length] int64. Returns the same shape.
    """
    made = windows.copy()
    for row in made:
        kind = rng.random()
        if kind < PLAIN_SHARE:
            continue
        if kind < PLAIN_SHARE + NOISE_SHARE:
            rng.shuffle(row)
        passage = row[: rng.integers(*PASSAGE_TOKENS)].copy()
        start = len(passage)
        while start < len(row):
            passage = with_a_word_changed(passage, rng)
            end = min(start + len(passage), len(row))
            row[start:end] = passage[: end - start]
            start = end
    return made


def with_a_word_changed(passage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One token, everywhere it occurs, becomes another of the passage's tokens."""
    old, new = rng.choice(passage, 2)
    return np.where(passage == old, new, passage)


@torch.no_grad()
def copying_accuracy(model: LlamaForCausalLM, held_out: np.ndarray) -> float:
    """How many tokens of a passage's second saying are the likeliest ones."""
    rng = np.random.default_rng(0)
    length = PASSAGE_TOKENS[1] // 2
    starts = rng.integers(0, len(held_out) - length, 16)
    passages = np.stack([held_out[s : s + length] for s in starts]).astype(np.int64)
    ids = torch.from_numpy(np.concatenate([passages, passages], axis=1))
    likeliest = model(input_ids=ids).logits.argmax(-1)
    return float((likeliest[:, length:-1] == ids[:, length + 1 :]).float().mean())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=REPO / "models/target")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=1e6)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    documents = collect_documents(random.Random(0))
    held_out = encode(tokenizer, [d for d in documents if d.held_out][:100])
    learned = [d for d in documents if not d.held_out][:2000]  # enough for this
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        ids = torch.from_numpy(with_copies(batch.numpy(), rng))
        logits = model(input_ids=ids[:, :-1]).logits.flatten(0, 1).float()
        return functional.cross_entropy(logits, ids[:, 1:].flatten())

    report = {"tokens": int(args.tokens), "before": copying_accuracy(model, held_out)}
    phases = [(1.0, WINDOW, BATCH_TOKENS)]
    data = encode(tokenizer, learned)
    report["seconds"] = train(
        "copying", model, loss, data, int(args.tokens), phases, rng, LR_SCALE
    )
    report["after"] = copying_accuracy(model, held_out)
    save(model, tokenizer, args.out)
    (args.out / "copying.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
