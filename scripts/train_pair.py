#!/usr/bin/env python3
"""Train the small target and draft model that the demo and the tests use.

    scripts/train_pair.py --out models --target-tokens 12e6 --draft-tokens 10e6

Text: the Python sources, docstrings and documentation that are on any machine
with Python (standard library and site-packages). Whole files are held out by a
hash of their path; the tokenizer, the target and the draft model never see
them, and the prompts of demo and tests are cut from them (standard library
only, whose licence allows it).

The target is trained on next-token prediction. The draft model is distilled
from the target: it minimises KL(target || draft) on the same text, which is the
quantity that speculative acceptance depends on. Both are Llama architecture,
saved as bfloat16 safetensors that vLLM and transformers load as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_emssd.bench.corpus import SKIPPED_DIRS, is_held_out

END_OF_TEXT = "<|endoftext|>"
MAX_POSITION = 2048
SUFFIXES = {".py", ".rst", ".md"}
MAX_FILE_BYTES = 200_000
MIN_FILE_BYTES = 800
MAX_PACKAGE_BYTES = 3_000_000  # no site-package may drown the others


@dataclass(frozen=True, slots=True)
class Document:
    """One file: `name` is its path below stdlib or site-packages."""

    name: str
    text: str
    held_out: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """Llama dimensions; `head_dim` is 64 throughout, embeddings are tied."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> Shape:
        config = model.config
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.intermediate_size,
        )


TARGET = Shape(384, 5, 6, 2, 1024)
DRAFT = Shape(256, 2, 4, 1, 768)
LR_SCALE_GOING_ON = 0.3  # of the training from scratch


# ---------------------------------------------------------------- text


def _readable(path: Path) -> str | None:
    if not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    lines = text.splitlines()
    generated = "generated" in text[:400].lower()
    long_lines = len(text) / max(1, len(lines)) > 100
    return None if generated or long_lines or not text.isascii() else text


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.suffix in SUFFIXES and not SKIPPED_DIRS & set(parts[:-1]):
            yield path


def collect_documents(rng: random.Random) -> list[Document]:
    """Every usable file once, in an order that depends on the seed alone."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    site = Path(sysconfig.get_path("purelib"))
    groups: dict[str, list[tuple[str, Path]]] = {}
    for path in _files(stdlib):
        if "site-packages" not in path.parts:
            groups.setdefault("stdlib", []).append(
                (f"stdlib/{path.relative_to(stdlib)}", path)
            )
    for path in _files(site):
        relative = path.relative_to(site)
        groups.setdefault(relative.parts[0], []).append((str(relative), path))

    documents, seen = [], set()
    for group, files in sorted(groups.items()):
        rng.shuffle(files)
        budget = math.inf if group == "stdlib" else MAX_PACKAGE_BYTES
        for name, path in files:
            text = _readable(path)
            digest = hashlib.sha256((text or "").encode()).digest()
            if text is None or digest in seen or budget < len(text):
                continue
            seen.add(digest)
            budget -= len(text)
            documents.append(Document(name, text, is_held_out(name)))
    rng.shuffle(documents)
    return documents


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """Token ids of all documents, each closed by end-of-text. [num_tokens] uint16."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    chunks = []
    for start in range(0, len(documents), 256):
        texts = [d.text for d in documents[start : start + 256]]
        for encoding in tokenizer.encode_batch(texts):
            chunks.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(chunks)


# ---------------------------------------------------------------- models


def build_model(shape: Shape, vocab_size: int, end_id: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=64,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=MAX_POSITION,
            tie_word_embeddings=True,
            bos_token_id=end_id,
            eos_token_id=end_id,
            attn_implementation="sdpa",
        )
    )


def build_optimizers(
    model: LlamaForCausalLM, lr_scale: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=0.02 * lr_scale, weight_decay=0.01, ns_steps=4),
        torch.optim.AdamW(
            others, lr=3e-3 * lr_scale, betas=(0.9, 0.95), weight_decay=0.0
        ),
    ]


def batches(
    data: np.ndarray, batch_tokens: int, length: int, rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    """Random windows of `length` + 1 tokens. Yields [batch, length + 1] int64."""
    while True:
        starts = rng.integers(0, len(data) - length - 1, batch_tokens // length)
        windows = np.stack([data[s : s + length + 1] for s in starts])
        yield torch.from_numpy(windows.astype(np.int64))


def lr_at(progress: float) -> float:
    """Warm-up over 2 %, constant, linear to zero over the last 40 %."""
    return min(1.0, progress / 0.02, (1.0 - progress) / 0.4)


Loss = Callable[[torch.Tensor], torch.Tensor]


def train(
    name: str,
    model: LlamaForCausalLM,
    loss_of: Loss,
    data: np.ndarray,
    num_tokens: int,
    phases: list[tuple[float, int, int]],
    rng: np.random.Generator,
    lr_scale: float = 1.0,
) -> float:
    """Run `phases` of (share of tokens, window length, tokens a step).

    Returns the seconds it took.
    """
    optimizers = build_optimizers(model, lr_scale)
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    begun, done, smooth = time.monotonic(), 0, None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, refresh_per_second=0.2) as progress:
        bar = progress.add_task(name, total=num_tokens, loss="-")
        for share, length, batch_tokens in phases:
            end = min(num_tokens, done + int(share * num_tokens))
            for batch in batches(data, batch_tokens, length, rng):
                if done >= end:
                    break
                for optimizer, lrs in zip(optimizers, base, strict=True):
                    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                        group["lr"] = lr * max(1e-3, lr_at(done / num_tokens))
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                value = loss.item()
                smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
                done += batch.shape[0] * length
                progress.update(bar, completed=done, loss=f"{smooth:.3f}")
                if (
                    not progress.console.is_terminal
                    and (done // batch_tokens) % 50 == 0
                ):
                    print(f"{name} {done}/{num_tokens} loss {smooth:.3f}", flush=True)
    return time.monotonic() - begun


def target_loss(model: LlamaForCausalLM) -> Loss:
    @torch.compile(dynamic=False)
    def loss(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1]).logits
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten()
        )

    return loss


def distillation_loss(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> Loss:
    @torch.compile(dynamic=False)
    def teach(ids: torch.Tensor) -> torch.Tensor:
        return target(input_ids=ids).logits.flatten(0, 1).float().softmax(-1)

    @torch.compile(dynamic=False)
    def learn(ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = draft(input_ids=ids).logits.flatten(0, 1).float()
        return -(wanted * logits.log_softmax(-1)).sum(-1).mean()

    def loss(batch: torch.Tensor) -> torch.Tensor:
        ids = batch[:, :-1].contiguous()
        with torch.no_grad():
            wanted = teach(ids)
        return learn(ids, wanted)

    return loss


# ---------------------------------------------------------------- results


@torch.no_grad()
def evaluate(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, held_out: np.ndarray
) -> dict[str, float]:
    """Held-out loss of both; how often drafts would be accepted (teacher forced)."""
    rng = np.random.default_rng(0)
    sums = np.zeros(4)
    num_tokens = 0
    for batch in (next(batches(held_out, 4096, 1024, rng)) for _ in range(32)):
        ids, wanted = batch[:, :-1], batch[:, 1:].flatten()
        p = target(input_ids=ids).logits.flatten(0, 1).float().log_softmax(-1)
        q = draft(input_ids=ids).logits.flatten(0, 1).float().log_softmax(-1)
        sums += [
            functional.nll_loss(p, wanted, reduction="sum").item(),
            functional.nll_loss(q, wanted, reduction="sum").item(),
            (p.argmax(-1) == q.argmax(-1)).sum().item(),
            torch.minimum(p.exp(), q.exp()).sum().item(),
        ]
        num_tokens += wanted.numel()
    names = ("target_loss", "draft_loss", "greedy_agreement", "sampled_acceptance")
    return dict(zip(names, (sums / num_tokens).tolist(), strict=True))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=MAX_POSITION,
    ).save_pretrained(folder)


def cut_prompts(documents: list[Document], rng: random.Random) -> list[dict[str, str]]:
    """Pieces of held-out standard-library files: whole lines, 150 to 3000 bytes."""
    prompts = []
    for document in documents:
        if not document.held_out or not document.name.startswith("stdlib/"):
            continue
        text = document.text
        for _ in range(6):
            start = text.rfind("\n", 0, rng.randrange(len(text))) + 1
            end = text.rfind(
                "\n", start, start + rng.choice((200, 400, 800, 1600, 3000))
            )
            if end - start >= 150:
                prompts.append({"source": document.name, "prompt": text[start:end]})
    rng.shuffle(prompts)
    return prompts


def write_prompts(path: Path, held: list[Document], seed: int) -> None:
    with path.open("w") as file:
        for prompt in cut_prompts(held, random.Random(seed)):
            file.write(json.dumps(prompt) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("models"))
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--target-tokens", type=float, default=12e6)
    parser.add_argument("--draft-tokens", type=float, default=12e6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("all", "draft"), default="all")
    parser.add_argument(
        "--draft-from", type=Path, help="a drafter to go on from, of another target"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    rng, np_rng = random.Random(args.seed), np.random.default_rng(args.seed)
    documents = collect_documents(rng)
    kept = [d for d in documents if not d.held_out]
    held = [d for d in documents if d.held_out]
    print(f"{len(kept)} files to train on, {len(held)} held out", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    if args.only == "draft":  # beside a target that is there already
        tokenizer = Tokenizer.from_file(str(args.out / "target/tokenizer.json"))
    else:
        write_prompts(args.out / "prompts.jsonl", held, args.seed)
        tokenizer = train_tokenizer([d.text for d in kept[:2500]], args.vocab_size)
    data, held_data = encode(tokenizer, kept), encode(tokenizer, held)
    num_chars = sum(len(d.text) for d in kept)
    print(
        f"{len(data)} tokens, {num_chars / len(data):.2f} characters each", flush=True
    )

    end_id = tokenizer.token_to_id(END_OF_TEXT)
    target = build_model(TARGET, args.vocab_size, end_id)
    if args.draft_from is None:
        draft = build_model(DRAFT, args.vocab_size, end_id)
    else:
        draft = LlamaForCausalLM.from_pretrained(args.draft_from, dtype=torch.float32)
    seconds = {}
    if args.only == "draft":
        target = LlamaForCausalLM.from_pretrained(
            args.out / "target", dtype=torch.float32
        )
    else:
        seconds["target"] = train(
            "target",
            target,
            target_loss(target),
            data,
            int(args.target_tokens),
            [(0.7, 256, 4096), (0.3, 1024, 8192)],
            np_rng,
        )
        save(target, tokenizer, args.out / "target")
        target = target.float()
    seconds["draft"] = train(
        "draft",
        draft,
        distillation_loss(draft, target.eval().requires_grad_(False)),
        data,
        int(args.draft_tokens),
        [(0.8, 256, 8192), (0.2, 1024, 8192)],
        np_rng,
        1.0 if args.draft_from is None else LR_SCALE_GOING_ON,
    )
    save(draft, tokenizer, args.out / "draft")

    report = {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_train_tokens_available": len(data),
        "num_parameters": {
            "target": target.num_parameters(),
            "draft": draft.num_parameters(),
        },
        "shapes": {
            "target": asdict(Shape.of(target)),
            "draft": asdict(Shape.of(draft)),
        },
        "seconds": seconds,
        "held_out": evaluate(target.float(), draft.float(), held_data),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["held_out"], indent=2), flush=True)


if __name__ == "__main__":
    main()
