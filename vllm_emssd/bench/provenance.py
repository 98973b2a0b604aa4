"""Where a result comes from: command, commit, versions, machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vllm_emssd

COMMIT = "EMSSD_COMMIT"  # for copies of the code that are no checkout of it
ENVIRONMENT = (
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "VLLM_CPU_OMP_THREADS_BIND",
    "THP_MEM_ALLOC_ENABLE",
    "EMSSD_CPU_FIXES",
    "CUDA_VISIBLE_DEVICES",
)


def provenance() -> dict[str, Any]:
    import torch

    return {
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(Path(vllm_emssd.__file__).parent),
        "vllm": version("vllm"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "vllm_emssd": vllm_emssd.__version__,
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "gpus": [
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        ],
        "load_average": os.getloadavg(),
        "environment": environment(),
    }


def _program() -> str:
    """`python -m vllm_emssd` is the same program as `vllm-emssd`."""
    path = Path(sys.argv[0])
    return "vllm-emssd" if path.name == "__main__.py" else path.name


def environment() -> dict[str, str | None]:
    """Of preloaded libraries the names alone, not where this machine keeps them."""
    found = {name: os.environ.get(name) for name in ENVIRONMENT}
    preloads = (found["LD_PRELOAD"] or "").split(":")
    return found | {"LD_PRELOAD": ":".join(Path(p).name for p in preloads) or None}


def commit(folder: Path) -> str:
    """What EMSSD_COMMIT says; else of the checkout, with `-dirty` where it was changed;
    or nothing."""
    if COMMIT in os.environ:
        return os.environ[COMMIT]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip()


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line[:10] == "model name"]
    return models[0] if models else platform.machine()
