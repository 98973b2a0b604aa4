"""The GPU worker's module leaves torch's CUDA interface alone."""

from __future__ import annotations

from tests.fresh_process import python


def test_gpu_worker_imports_nothing_of_the_cpu_worker() -> None:
    """The CPU worker's module replaces streams, events and copies by no-ops."""
    code = (
        "import sys\n"
        "import vllm_emssd.integration.worker, vllm_emssd.integration.v1.runner\n"
        "import vllm_emssd.integration.v2.runner\n"
        "print([name for name in sys.modules if name.endswith('worker.cpu.shm')])"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
