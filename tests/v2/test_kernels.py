"""The kernels by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.v2.copies import OPTIONS, SEEDS

REPO = Path(__file__).resolve().parents[2]
TIMEOUT = 600  # seconds: 60 beside no other process


def result(module: str, folder: Path) -> Any:
    """Of a module that is a process of its own."""
    path = folder / "results.json"
    subprocess.run(
        [sys.executable, "-m", module, str(path)],
        cwd=REPO,
        check=True,
        timeout=TIMEOUT,
    )
    return json.loads(path.read_text())


def test_copies_are_those_of_the_proposer_for_v1(tmp_path: Path) -> None:
    """Token for token: the runs compare them themselves."""
    runs = result("tests.v2.copies", tmp_path)
    assert len(runs) == len(OPTIONS) * len(SEEDS)
    for name in ("accepted", "edits", "followed prompts"):
        assert sum(run[name] for run in runs) > 5


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    sizes = result("tests.v2.compiled", tmp_path)
    assert len(sizes) == 5
    assert min(sizes.values()) > 0
