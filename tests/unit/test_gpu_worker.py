"""The GPU worker's module leaves torch's CUDA interface alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def test_gpu_worker_imports_nothing_of_the_cpu_worker() -> None:
    """The CPU worker's module replaces streams, events and copies by no-ops."""
    code = (
        "import sys\n"
        "import vllm_emssd.integration.worker, vllm_emssd.integration.v1.runner\n"
        "import vllm_emssd.integration.v2.runner\n"
        "print([name for name in sys.modules if name.endswith('worker.cpu.shm')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
