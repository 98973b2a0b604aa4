"""Profiles of steps on a GPU, made up: what a step launches, how busy it keeps it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval

from tests.unit.test_harness import CountingEngine, requests
from vllm_emssd.bench import gpu_profile
from vllm_emssd.bench.engine_process import STEPS_BEFORE, _Engine
from vllm_emssd.bench.gpu_profile import of_a_step
from vllm_emssd.bench.request import Request


def event(name: str, start: float, end: float, device: str = "CPU") -> Any:
    return SimpleNamespace(
        name=name,
        time_range=Interval(start, end),
        device_type=getattr(DeviceType, device),
    )


def test_a_step_in_numbers() -> None:
    """Two steps of 2 ms each; kernels of two streams overlap."""
    found = of_a_step(
        [
            event("cudaLaunchKernel", 0, 5),
            event("cuLaunchKernelEx", 6, 8),
            event("cudaGraphLaunch", 10, 60),
            event("cudaMemcpyAsync", 70, 75),
            event("cudaEventSynchronize", 100, 1100),
            event("cudaStreamSynchronize", 1200, 1700),
            event("gemm", 400, 1400, "CUDA"),
            event("Memcpy HtoD", 1300, 1800, "CUDA"),
            event("softmax", 100, 300, "CUDA"),
        ],
        num_steps=2,
        ms=4.0,
    )
    assert found == pytest.approx(
        {
            "step_ms": 2.0,
            "host_ms": 1.25,
            "gpu_busy": 0.4,
            "kernels": 1.0,
            "graphs": 0.5,
            "copies": 0.5,
        }
    )


def test_as_many_requests_as_asked_for_are_profiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that end begin anew; in the end none is left."""
    counting = CountingEngine()

    class Fed(_Engine):
        def __init__(self) -> None:
            self._llm = SimpleNamespace(llm_engine=counting)
            self._profiler = SimpleNamespace(start_round=lambda: None)

        def _add(self, request: Request) -> str:
            name = str(len(counting.total))
            counting.left[name] = counting.total[name] = request.max_tokens
            return name

    def profile_steps(step: Any) -> dict[str, float]:
        for _ in range(20):
            step()
        return {"gpu_busy": 0.5}

    monkeypatch.setattr(gpu_profile, "profile_steps", profile_steps)
    assert Fed()._profile(requests(3, 7)) == {"gpu_busy": 0.5}
    assert counting.concurrency == [2] * (STEPS_BEFORE + 20)
    assert sorted(counting.aborted) == sorted(counting.left)
