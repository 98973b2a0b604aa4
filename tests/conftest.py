"""Environment of every test that starts an engine; set before vLLM is imported."""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines live in this process
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
# Of several test processes each gets a core: threads that wait for each other's cores
# are far slower.
num_threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count()
os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
