"""The environment of tests that start engines, set before vLLM is imported; and which
tests share a process where there are several."""

from __future__ import annotations

import os
from typing import Any

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

SHARED_RUNS = {  # folders and files that look at the same engines' runs
    "distributed": "distributed",
    "lossless/test_greedy.py": "greedy",
    "lossless/test_references.py": "greedy",
    "regression/test_against_stock.py": "against stock",
    "regression/test_faults.py": "against stock",
    "regression/test_not_asked_for.py": "against stock",
    "regression/test_proposers.py": "against stock",
}
LONGEST = ("distributed", "greedy", "v2/test_v2.py", "against stock", "v2", "lossless")


def _names(nodeid: str) -> list[str]:
    """Of a test: the group of its file, the file, and its folder."""
    _, _, file = nodeid.partition("::")[0].partition("tests/")
    names = [file, file.split("/")[0]]
    return [next((SHARED_RUNS[n] for n in names if n in SHARED_RUNS), file), *names]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin, so that no process is left with one of them at the end."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(
        key=lambda item: min(ranks.get(n, len(ranks)) for n in _names(item.nodeid))
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, files that share runs go to one process."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByRuns(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _names(nodeid)[0]

    return ByRuns(config, log)
