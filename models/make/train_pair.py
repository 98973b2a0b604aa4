"""Train the small target and draft model that the tests use.

    python -m models.make.train_pair --out /tmp/models

The text is that of any machine with Python (`documents.py`); whole files are held out,
and models/prompts.jsonl is cut from them. The target learns to predict the next token,
the draft model is distilled from it. A target that is in --out already is kept.
Both are Llamas, saved as bfloat16 safetensors that vLLM and transformers load.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.make.distillation import (
    Batch,
    Loss,
    acceptance,
    distillation_loss,
    logits_of,
    train,
)
from models.make.documents import Document, collect_documents

END_OF_TEXT = "<|endoftext|>"
MAX_POSITION = 2048
VOCAB_SIZE = 2048
BATCH_TOKENS = 8192
SHORT, LONG = 256, 1024  # tokens of a window
SHARE_OF_SHORT = 0.8  # of all steps; the long windows come last
TARGET = {
    "hidden_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
}
DRAFT = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 768,
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=MAX_POSITION,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> np.ndarray:
    """Token ids of all documents, each closed by end-of-text. [num_tokens] int64."""
    texts = (document.text + END_OF_TEXT for document in documents)
    ids = [np.array(tokenizer.encode(text, verbose=False)) for text in texts]
    return np.concatenate(ids)


def make_model(shape: dict[str, int]) -> LlamaForCausalLM:
    config = LlamaConfig(
        **shape,
        vocab_size=VOCAB_SIZE,
        head_dim=64,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def windows(data: np.ndarray, length: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Random pieces of the text, without end."""
    while True:
        starts = rng.integers(0, len(data) - length, BATCH_TOKENS // length)
        pieces = np.stack([data[start : start + length] for start in starts])
        yield torch.from_numpy(pieces), ...


def train_on(
    data: np.ndarray, model: LlamaForCausalLM, loss: Loss, num_tokens: float
) -> float:
    """Returns the seconds that it took."""
    rng, started = np.random.default_rng(1), time.monotonic()
    num_steps = max(2, int(num_tokens / BATCH_TOKENS))
    short = islice(windows(data, SHORT, rng), int(SHARE_OF_SHORT * num_steps))
    batches = chain(short, windows(data, LONG, rng))
    train(model, torch.compile(loss, dynamic=False), batches, num_steps)
    return time.monotonic() - started


def next_token_loss(model: LlamaForCausalLM) -> Loss:
    def loss(batch: Batch) -> torch.Tensor:
        token_ids, _ = batch
        logits = logits_of(model, (token_ids[:, :-1], ...))
        return functional.cross_entropy(logits, token_ids[:, 1:].flatten())

    return loss


def cut_prompts(documents: list[Document], rng: random.Random) -> Iterator[str]:
    """JSON lines of pieces of the standard library: whole lines, 150 to 3000 bytes."""
    for document in documents:
        if not document.name.startswith("stdlib/"):
            continue
        text = document.text
        for _ in range(6):
            start = text.rfind("\n", 0, rng.randrange(len(text))) + 1
            end = text.rfind("\n", 0, start + rng.choice((200, 400, 800, 1600, 3000)))
            if end - start >= 150:
                yield json.dumps({"source": document.name, "prompt": text[start:end]})


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    model.float()
    tokenizer.save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target-tokens", type=float, default=12e6, help="trained on")
    parser.add_argument("--draft-tokens", type=float, default=12e6)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(1)
    documents = collect_documents(1)
    held_out = [document for document in documents if document.is_held_out]
    known = [document for document in documents if not document.is_held_out]
    folder, seconds = arguments.out / "target", {}
    is_new = not folder.exists()
    if is_new:
        arguments.out.mkdir(parents=True, exist_ok=True)
        prompts = [*cut_prompts(held_out, random.Random(1))]
        random.Random(1).shuffle(prompts)
        (arguments.out / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
        tokenizer = train_tokenizer([document.text for document in known[:2500]])
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    data = encode(tokenizer, known)
    print(f"{len(data)} tokens of {len(known)} files; {len(held_out)} held out")

    if is_new:
        target = make_model(TARGET)
        loss = next_token_loss(target)
        seconds["target"] = train_on(data, target, loss, arguments.target_tokens)
        save(target, tokenizer, folder)
    target = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    draft = make_model(DRAFT)
    loss = distillation_loss(draft, target)
    seconds["draft"] = train_on(data, draft, loss, arguments.draft_tokens)
    save(draft, tokenizer, arguments.out / "draft")

    rng = np.random.default_rng(0)
    measured = [*islice(windows(encode(tokenizer, held_out), LONG, rng), 16)]
    report = {
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "num_train_tokens_available": len(data),
        "seconds": seconds,
        "held_out": acceptance(draft, target, measured),
    }
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["held_out"], indent=2))


if __name__ == "__main__":
    main()
