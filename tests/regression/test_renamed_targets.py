"""A vLLM that renamed what a hook replaces: a start with emssd fails and says so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import vllm

from tests.engine import TARGET
from tests.fresh_process import python
from vllm_emssd.integration.hooks.compat import SUPPORTED_VLLM

INSTALLED = Path(vllm.__file__).parent
START = f"""
from vllm import LLM
LLM({TARGET!r}, max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=64 << 20,
    speculative_config={{"method": "emssd"}})
"""


def doctored(root: Path, file: str, *renamed: tuple[str, str]) -> Path:
    """A copy of the installed vLLM, of links but for one file with names changed."""
    shutil.copytree(INSTALLED, root / "vllm", copy_function=os.symlink)
    text = (INSTALLED / file).read_text()
    for old, new in renamed:
        assert old in text
        text = text.replace(old, new)
    (root / "vllm" / file).unlink()
    (root / "vllm" / file).write_text(text)
    return root


FILE = "v1/worker/gpu_model_runner.py"
TARGET_NAME = "vllm.v1.worker.gpu_model_runner:build_logitsprocs"


def test_start_with_emssd_names_the_target(tmp_path: Path) -> None:
    """In the worker; of the front end see test_inventory.py."""
    root = doctored(
        tmp_path,
        FILE,
        (", build_logitsprocs", ", build_logitsprocs as build_processors"),
        ("=build_logitsprocs(", "=build_processors("),
    )
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = python("-c", START, PYTHONPATH=path)
    assert done.returncode != 0
    assert f"{TARGET_NAME} is missing" in done.stderr
    assert str(SUPPORTED_VLLM) in done.stderr
    listed = python("-m", "vllm_emssd", "doctor", PYTHONPATH=path)
    assert listed.returncode == 1
    assert f"{TARGET_NAME} is missing" in listed.stdout
