"""Starting and stopping again and again leaves nothing behind."""

from __future__ import annotations

import json
import signal
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.distributed.conftest import Runs
from tests.distributed.engines import REPO, RayCluster, Setting, run_job
from tests.distributed.processes import Tree, wait_for
from tests.engine import TARGET
from vllm_emssd.bench.server_process import free_port

pytestmark = pytest.mark.distributed

NUM_CYCLES = 50
RAY_EVERY = 5  # cycles: one over Ray


@pytest.mark.slow
@pytest.mark.parametrize("cycle", range(NUM_CYCLES))
def test_cycle(cycle: int, runs: Runs, tmp_path: Path) -> None:
    is_ray = cycle % RAY_EVERY == RAY_EVERY - 1
    proposer = ("draft_model", "llma")[cycle % 2]
    setting = Setting(proposer, "auto", tp=2, backend="ray" if is_ray else "mp")
    cluster = runs.cluster if is_ray else None
    outcome = run_job(setting, tmp_path / "job", cluster).check()
    assert sum(map(len, outcome.report.token_ids)) > 0
    outcome.left_nothing()


def test_stopping_the_cluster(runs: Runs) -> None:
    assert runs.cluster.tree.members()
    exit_code, left = runs.stop_cluster()
    assert (exit_code, left) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("stopped_by", ["SIGTERM", "SIGINT"])
def test_serving_over_ray(stopped_by: str, tmp_path: Path) -> None:
    """One command: a cluster, a server that answers, and nothing left of both."""
    port = free_port()
    command = [sys.executable, str(REPO / "scripts" / "launch_ray.py"), "serve", TARGET]
    command += ["-tp", "2", "--num-gpus", "2", "--num-cpus", "8"]
    command += ["--ray-port", str(free_port()), "--token-file", str(tmp_path / "token")]
    command += ["--port", str(port), "--served-model-name", "target"]
    command += ["--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]
    command += ["--kv-cache-memory-bytes", str(128 << 20)]
    command += ["--speculative-config", '{"method":"emssd","draft_length":"auto"}']
    server = Tree(command, tmp_path / "log", RayCluster.own_environment())
    url = f"http://127.0.0.1:{port}"
    try:
        assert wait_for(lambda: "startup complete" in server.text, 200), server.text
        body = {"model": "target", "prompt": "def f(x):", "max_tokens": 20}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body | {"temperature": 0, "ignore_eos": True}).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert answer["usage"]["completion_tokens"] == 20
        metrics = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
        assert "vllm_emssd:num_emitted_tokens_total" in metrics
    finally:
        server.process.send_signal(signal.Signals[stopped_by])
        exit_code = server.wait(90)
        left = server.leftovers(5)
    assert (exit_code, left) == (0, []), server.text
    assert server.segments() == set()
