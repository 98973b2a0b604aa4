"""`scripts/launch_ray`, as a user starts it: servers that answer, and nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
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
# vLLM puts all engines on the first machine unless told how many. With one API server
# process our counters are on its /metrics.
DATA_PARALLEL = ["-dp", "2", "--data-parallel-size-local", "1"]
DATA_PARALLEL += ["--api-server-count", "1"]


@contextmanager
def launched(
    log: Path,
    *arguments: str,
    ready: str,
    stopped_by: str = "SIGINT",
    on: Sequence[str] = (),
) -> Iterator[Tree]:
    """The script, until it is stopped: it ends in peace, and with all it started.
    `on`: runs a command on another machine."""
    environment = RayCluster.own_environment() | {"VIRTUAL_ENV": sys.prefix}
    tree = Tree([*on, str(SCRIPT), *arguments], log, environment)
    try:
        wait_for(lambda: ready in tree.text or tree.process.poll() is not None, 330)
        assert ready in tree.text, tree.text
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


@dataclass(frozen=True)
class Hosts:
    """A head's machine, which is this one, and a worker's."""

    head: list[str]  # flags
    worker: list[str]
    on_worker: list[str]  # runs a command there


@contextmanager
def one_host() -> Iterator[Hosts]:
    """Both nodes here. vLLM knows nodes by their addresses, and these have the same."""
    yield Hosts([], [], [])


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """The second is a network namespace: another address, reached over a link."""
    name, link = f"emssd-{os.getpid()}", f"emssd{os.getpid() % 100_000}"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a second host needs iproute2 and the right to use it: {error}")
    try:
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("address", "add", "10.231.77.1/30", "dev", link)
        ip("link", "set", link, "up")
        ip("-n", name, "address", "add", "10.231.77.2/30", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        yield Hosts(
            ["--address", "10.231.77.1"],
            ["--address", "10.231.77.2"],
            ["ip", "netns", "exec", name],
        )
    finally:
        ip("netns", "delete", name)  # and with it the link


@pytest.mark.parametrize(
    ("hosts", "parallel", "gpus"),
    [
        (one_host, ["-tp", "2"], 1),
        (two_hosts, ["-tp", "2", *DATA_PARALLEL], 2),
    ],
)
def test_head_worker_and_serve(
    hosts: Callable[[], AbstractContextManager[Hosts]],
    parallel: list[str],
    gpus: int,
    tmp_path: Path,
) -> None:
    """Two nodes, each with half of the devices that are needed."""
    port = free_port()
    token = ["--token-file", str(tmp_path / "token")]
    node = [*token, "--num-gpus", str(gpus), "--num-cpus", "8"]
    ready = "ready; the head is "
    with hosts() as machines, ExitStack() as stack:

        def start(
            command: str, *flags: str, ready: str, on: Sequence[str] = ()
        ) -> Tree:
            log = tmp_path / command
            return stack.enter_context(
                launched(log, command, *flags, ready=ready, on=on)
            )

        ray_port = ["--ray-port", str(free_port())]
        head = start("head", *ray_port, *node, *machines.head, ready=ready)
        address = head.text.partition(ready)[2].split(". ")[0]
        joins = ["--head", address]
        worker = start(
            *("worker", *joins, *node, *machines.worker),
            ready=ready,
            on=machines.on_worker,
        )
        serve = [TARGET, *joins, *parallel, *token, *machines.head, *SERVED]
        start("serve", *serve, "--port", str(port), ready="startup complete")
        check_answer(port)
        assert [len(workers_of(node)) for node in (head, worker)] == [gpus, gpus]
    assert worker.segments() == set()
