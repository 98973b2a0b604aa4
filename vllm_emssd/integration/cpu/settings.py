"""What vLLM wants in its environment on a CPU: preloaded libraries, threads, pages.

A library is preloaded only into a process that starts, and vLLM's engine inherits its
parent's environment: so all of this must be set before vLLM is.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

PRELOADS = ("libiomp5", "libtcmalloc")  # Intel OpenMP and a faster malloc
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # makes torch ask the system for them
FEW_CPUS = 4  # with so few, a core kept for the scheduler slows the model

_TCMALLOC = "libtcmalloc_minimal.so.4"
_TCMALLOC_PLACES = ("/usr/lib", "/usr/local/lib")


def has_nvidia_gpu() -> bool:
    """Without importing torch: `serve` has to be quick."""
    devices = Path("/proc/driver/nvidia/gpus")
    return devices.is_dir() and any(devices.iterdir())


def num_cpus() -> int:
    """CPUs that this process may use: its affinity, or the time that its container is
    given (`docker --cpus`), whichever is less."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else max(min(count, int(quota)), 1)


def cpu_quota(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    """CPUs whose time this process's control group may use, of version 1 or 2; None
    without a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = groups
        elif "cpu" in controllers.split(","):
            root = groups / "cpu"
        else:
            continue
        folder = root / path.lstrip("/")
        # A container may see its own group as the root, whatever its path.
        for place in {root, folder, *folder.parents}:
            if place.is_relative_to(root) and (quota := _quota_of(place)) is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_of(group: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota = (group / "cpu.cfs_quota_us").read_text()
        period = (group / "cpu.cfs_period_us").read_text()
        return None if int(quota) < 0 else int(quota) / int(period)
    return None


def find_preloads(prefix: str = sys.prefix) -> list[Path]:
    """Those of `PRELOADS` that are installed, and that LD_PRELOAD can name: it takes a
    space for the end of a path."""
    found = [Path(prefix) / "lib" / "libiomp5.so"]
    for place in _TCMALLOC_PLACES:
        found += sorted(Path(place).glob(f"**/{_TCMALLOC}"))[:1]
    return [path for path in found[:2] if path.exists() and " " not in str(path)]


def missing_preloads(environment: Mapping[str, str]) -> list[str]:
    """Those of `PRELOADS` that LD_PRELOAD does not name."""
    preloaded = environment.get("LD_PRELOAD", "")
    return [name for name in PRELOADS if name not in preloaded]


def settings_here(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to add for a server on this machine's CPU. What the user set stays.

    On few CPUs, or a share of the machine's, no thread is bound and no core kept; on
    more, vLLM's own "auto" binds one thread to each core.
    """
    added, cpus = {}, num_cpus()
    wanted = missing_preloads(environment)
    new = [str(p) for p in find_preloads() if any(name in p.name for name in wanted)]
    if new:
        given = environment.get("LD_PRELOAD", "")
        added["LD_PRELOAD"] = ":".join([*new, *filter(None, [given])])
    bind = environment.get("VLLM_CPU_OMP_THREADS_BIND")
    if bind is None and (cpus <= FEW_CPUS or cpu_quota() is not None):
        bind = added["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if bind == "nobind" and "OMP_NUM_THREADS" not in environment:
        added["OMP_NUM_THREADS"] = str(cpus)
    if HUGE_PAGES not in environment:
        added[HUGE_PAGES] = "1"  # a forward reads all weights: fewer pages to look up
    return added


def exports(environment: Mapping[str, str]) -> str:
    """Lines for a shell that set what is not set, for the scripts of the repository."""
    added = settings_here(environment)
    return "\n".join(f"export {name}={shlex.quote(v)}" for name, v in added.items())


if __name__ == "__main__":
    print(exports(os.environ))
