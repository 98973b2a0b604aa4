"""A vLLM platform for tests only: the CPU, on which Ray may place workers.

Stock refuses Ray on a CPU, as that platform names no resource of Ray's to count. This
one counts logical "GPUs", of which `ray start --num-gpus N` offers as many as wanted.

Found by vLLM only where this folder is on PYTHONPATH, and active only with
EMSSD_TEST_RAY_ON_CPU=1; both must be set for `ray start` too. It is no part of the
installed package.
"""

from __future__ import annotations

import os

SWITCH = "EMSSD_TEST_RAY_ON_CPU"


def platform() -> str | None:
    """vLLM's entry point: the class to use, or None to leave vLLM as it is."""
    if os.environ.get(SWITCH) != "1":
        return None
    return "emssd_test_platform_class.RayOnCpuPlatform"
