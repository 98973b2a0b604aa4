"""A vLLM with the patches applied needs no hooks; another release is as expected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent


def check_patches(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.check_patches", *args],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_installed_vllm_patched_runs_without_hooks() -> None:
    said = check_patches()
    assert "ok   emssd runs on the patched copy without hooks" in said
    assert said.endswith("all fits\n")


@pytest.mark.slow  # downloads the release's wheel, once
def test_vllm_0_33_is_as_expected() -> None:
    said = check_patches("0.33.0")
    assert "vLLM 0.33.0 (read), patches of vllm-0.33" in said
    assert said.endswith("all fits\n")
