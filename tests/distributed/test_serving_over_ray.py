"""`scripts/launch_ray`, as a user starts it: servers that answer, and nothing left."""

from __future__ import annotations

import json
import signal
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.engines import REPO, RayCluster
from tests.distributed.processes import Tree, wait_for
from tests.engine import TARGET
from vllm_emssd.bench.server_process import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = REPO / "scripts" / "launch_ray"
SERVED = ["--served-model-name", "target", "--enforce-eager", "--max-model-len", "1024"]
SERVED += ["--dtype", "float32", "--kv-cache-memory-bytes", str(128 << 20)]
SERVED += ["--speculative-config", '{"method":"emssd","draft_length":"auto"}']


@contextmanager
def launched(
    log: Path, *arguments: str, ready: str, stopped_by: str = "SIGINT"
) -> Iterator[Tree]:
    """The script, until it is stopped: it ends in peace, and with all it started."""
    environment = RayCluster.own_environment() | {"VIRTUAL_ENV": sys.prefix}
    tree = Tree([str(SCRIPT), *arguments], log, environment)
    try:
        assert wait_for(lambda: ready in tree.text, 330), tree.text
        yield tree
    finally:
        tree.process.send_signal(signal.Signals[stopped_by])
        exit_code = tree.wait(90)
        left = tree.leftovers(5)
    assert (exit_code, left) == (0, []), tree.text


def check_answer(port: int) -> None:
    url = f"http://127.0.0.1:{port}"
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


def workers_of(tree: Tree) -> list[str]:
    names = [" ".join(process.cmdline()) for process in tree.members()]
    return [name for name in names if "RayWorkerProc" in name]


@pytest.mark.parametrize("stopped_by", ["SIGTERM", "SIGINT"])
def test_one_machine(stopped_by: str, tmp_path: Path) -> None:
    """One command: a cluster, a server that answers, and nothing left of both."""
    port = free_port()
    arguments = ["serve", TARGET, "-tp", "2", "--num-gpus", "2", "--num-cpus", "8"]
    arguments += ["--ray-port", str(free_port()), "--port", str(port)]
    arguments += ["--token-file", str(tmp_path / "token"), *SERVED]
    with launched(
        tmp_path / "log", *arguments, ready="startup complete", stopped_by=stopped_by
    ) as server:
        check_answer(port)
    assert server.segments() == set()


def test_head_worker_and_serve(tmp_path: Path) -> None:
    """Two nodes, on one machine here, each with half of the devices. Not with -dp: vLLM
    knows nodes by their addresses, and these two have the same."""
    port = free_port()
    token = ["--token-file", str(tmp_path / "token")]
    node = [*token, "--num-gpus", "1", "--num-cpus", "8"]
    ready = "ready; the head is "
    with launched(
        tmp_path / "head", "head", "--ray-port", str(free_port()), *node, ready=ready
    ) as head:
        address = head.text.partition(ready)[2].split(". ")[0]
        with launched(
            tmp_path / "worker", "worker", "--head", address, *node, ready=ready
        ) as worker:
            joined = ["serve", TARGET, "--head", address, "-tp", "2", *token]
            with launched(
                tmp_path / "serve",
                *joined,
                "--port",
                str(port),
                *SERVED,
                ready="startup complete",
            ):
                check_answer(port)
                used = [len(workers_of(node)) for node in (head, worker)]
                assert used == [1, 1]
        assert worker.segments() == set()
