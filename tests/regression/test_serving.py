"""A real server, started by `vllm-emssd serve`: its metrics, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.engine import DRAFT_MODEL, TARGET
from vllm_emssd.bench.server_process import (
    ServerProcess,
    free_port,
    server_process,
)
from vllm_emssd.metrics import COUNTER_HELP

STOP_SECONDS = 60
COUNTERS_DIR = re.compile(r"vllm-emssd-\w+")
FLAGS = (
    "--served-model-name target --dtype float32 --enforce-eager --max-model-len 1280 "
    f"--kv-cache-memory-bytes {64 << 20} --host 127.0.0.1"
).split()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[ServerProcess]:
    port = free_port()
    asked = ["--speculative-config", json.dumps(DRAFT_MODEL), "--port", str(port)]
    command = [sys.executable, "-m", "vllm_emssd", "serve", TARGET, *FLAGS, *asked]
    env = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "TMPDIR": str(folder)}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # as it is in production
    with server_process("emssd", command, port, folder / "server.log", env) as server:
        yield server


def stream(
    server: ServerProcess, max_tokens: int
) -> contextlib.AbstractContextManager[httpx.Response]:
    body = {"model": "target", "prompt": "def ", "max_tokens": max_tokens}
    body |= {"stream": True, "ignore_eos": True, "temperature": 0}
    url = f"{server.base_url}/v1/completions"
    return httpx.stream("POST", url, json=body, timeout=60, trust_env=False)


@pytest.mark.slow
def test_metrics_then_sigterm_in_mid_stream(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        with stream(server, max_tokens=32) as answer:
            assert sum(line.startswith("data: {") for line in answer.iter_lines()) > 1

        text = server.get("/metrics").text
        for name, help_text in COUNTER_HELP.items():
            assert f"# HELP vllm_emssd:{name}_total {help_text}" in text
        accepted = re.search(r"vllm_emssd:num_accepted_tokens_total\{.*\} (\S+)", text)
        assert accepted is not None
        assert float(accepted[1]) > 0

        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children
        assert [p for p in tmp_path.iterdir() if COUNTERS_DIR.fullmatch(p.name)]

        num_lines = 0
        with (
            contextlib.suppress(httpx.HTTPError),
            stream(server, max_tokens=1200) as answer,
        ):
            for _ in answer.iter_lines():
                num_lines += 1
                if num_lines == 5:
                    server.process.terminate()
        assert 5 <= num_lines < 2000
        server.process.wait(STOP_SECONDS)
        _, left = psutil.wait_procs(children, timeout=15)
        assert left == []
        assert not [p for p in tmp_path.iterdir() if COUNTERS_DIR.fullmatch(p.name)]
