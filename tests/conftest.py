"""Environment of every test that starts an engine; set before vLLM is imported."""

from __future__ import annotations

import os

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines live in this process
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
# Of several test processes each gets a core: threads that wait for each other's cores
# are far slower.
num_threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count()
os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in this hook too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share engines and their results: they run in one process. Those
    that start Ray run in one too, as its ports are fixed."""
    for item in items:
        folder = item.path.parent.name
        group = folder if folder == "distributed" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
