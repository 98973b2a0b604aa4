"""How busy a step keeps the GPU, and what it has the host do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Parts of the names of CUDA's functions, of the runtime and the driver.
COUNTED = {"kernels": "LaunchKernel", "graphs": "GraphLaunch", "copies": "Memcpy"}
WAITING = "Synchronize"


def profile_steps(step: Callable[[], object], num_steps: int = 20) -> dict[str, float]:
    """See `of_a_step`."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        for _ in range(num_steps):
            step()
        torch.accelerator.synchronize()
        ms = (time.perf_counter() - started) * 1e3
    return of_a_step(profiler.events() or (), num_steps, ms)


def of_a_step(events: Iterable[Any], num_steps: int, ms: float) -> dict[str, float]:
    """Its milliseconds; of them those in which the host did not wait for the device;
    the share of time in which the device computed or copied; and calls of the host.

    events: torch's, of steps that took `ms` together.
    """
    of_device: list[Any] = []
    calls: list[Any] = []
    for event in events:
        is_call = event.device_type.name == "CPU"
        (calls if is_call else of_device).append(event)
    busy_us = until = 0.0
    for span in sorted((e.time_range for e in of_device), key=lambda s: s.start):
        busy_us += max(span.end - max(span.start, until), 0.0)
        until = max(until, span.end)
    waits = [e.time_range.elapsed_us() for e in calls if WAITING in e.name]
    return {
        "step_ms": ms / num_steps,
        "host_ms": (ms - sum(waits) / 1e3) / num_steps,
        "gpu_busy": busy_us / 1e3 / ms,
    } | {
        name: sum(part in e.name for e in calls) / num_steps
        for name, part in COUNTED.items()
    }
