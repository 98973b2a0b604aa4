"""See emssd_test_platform.py; apart from it, as vLLM asks for the name first."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class RayOnCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"
