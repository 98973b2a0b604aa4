"""What vLLM wants in its environment on a CPU: preloaded libraries, threads, pages.

A library is preloaded only into a process that starts, and vLLM's engine inherits its
parent's environment: so all of this must be set before vLLM is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

PRELOADS = ("libiomp5", "libtcmalloc")  # Intel OpenMP and a faster malloc
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch asks for them, where the system lets it
FEW_CPUS = 4  # so few that a core kept for the scheduler is missed

_TCMALLOC = "libtcmalloc_minimal.so.4"
_TCMALLOC_PLACES = ("/usr/lib", "/usr/local/lib")


def has_nvidia_gpu() -> bool:
    """Without importing torch: `serve` has to be quick."""
    devices = Path("/proc/driver/nvidia/gpus")
    return devices.is_dir() and any(devices.iterdir())


def num_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_preloads(prefix: str = sys.prefix) -> list[Path]:
    """Those of `PRELOADS` that are installed."""
    found = [Path(prefix) / "lib" / "libiomp5.so"]
    for place in _TCMALLOC_PLACES:
        found += sorted(Path(place).glob(f"**/{_TCMALLOC}"))[:1]
    return [path for path in found[:2] if path.exists()]


def missing_preloads(environment: Mapping[str, str]) -> list[str]:
    """Those of `PRELOADS` that LD_PRELOAD does not name."""
    preloaded = environment.get("LD_PRELOAD", "")
    return [name for name in PRELOADS if name not in preloaded]


def cpu_settings(environment: Mapping[str, str], num_cpus: int) -> dict[str, str]:
    """Variables to add for a server on a CPU. What the user set stays.

    On few CPUs no thread is bound and no core kept; on more, vLLM's own "auto" binds
    one thread to each core.
    """
    added = {}
    wanted = missing_preloads(environment)
    new = [str(p) for p in find_preloads() if any(name in p.name for name in wanted)]
    if new:
        given = environment.get("LD_PRELOAD", "")
        added["LD_PRELOAD"] = ":".join([*new, *filter(None, [given])])
    bind = environment.get("VLLM_CPU_OMP_THREADS_BIND")
    if bind is None and num_cpus <= FEW_CPUS:
        bind = added["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if bind == "nobind" and "OMP_NUM_THREADS" not in environment:
        added["OMP_NUM_THREADS"] = str(num_cpus)
    if HUGE_PAGES not in environment:
        added[HUGE_PAGES] = "1"  # a forward reads all weights: fewer pages to look up
    return added
