"""A server in a process of its own, gone with all its children at the end."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from vllm_emssd.bench.engine_process import EngineError

START_S = 300
STOP_S = 20
LOG_LINES = 15  # of a server that failed, shown with the error


@dataclass(frozen=True, slots=True)
class ServerProcess:
    name: str
    base_url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> httpx.Response:
        # trust_env=False: no proxy stands between us and this machine.
        return httpx.get(self.base_url + path, timeout=30, trust_env=False)

    def metrics(self) -> dict[str, float]:
        """All samples of vLLM's and ours on /metrics, summed over engines and labels.

        Raises httpx.HTTPError.
        """
        text = self.get("/metrics").raise_for_status().text
        found: defaultdict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(("vllm:", "vllm_emssd:")):
                    found[sample.name] += sample.value
        return dict(found)

    def end_of_log(self, num_lines: int) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])


class ServerError(EngineError):
    """A server did not start, or died. The end of its log is in the message."""

    def __init__(self, server: ServerProcess, what: str) -> None:
        end = server.end_of_log(LOG_LINES)
        super().__init__(f"the server of {server.name!r} {what}:\n{end}")
        self.server, self.what = server, what


def vllm_command() -> str:
    """The `vllm` beside this Python."""
    return str(Path(sys.executable).parent / "vllm")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server_process(
    name: str,
    command: Sequence[str],
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    start_s: float = START_S,
) -> Iterator[ServerProcess]:
    """A healthy server, on whose `port` the command says that it listens.

    Args:
        log: gets the command and all that the server prints.
        environment: all of it; this process's own if not given.

    Raises ServerError.
    """
    log.write_text(f"{shlex.join(command)}\n")
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=os.environ if environment is None else environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own group, so that all of it can be ended
        )
    server = ServerProcess(name, f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_healthy(server, start_s)
        yield server
    finally:
        _stop(process)


def _wait_until_healthy(server: ServerProcess, start_s: float) -> None:
    deadline = time.monotonic() + start_s
    while time.monotonic() < deadline:
        if (status := server.process.poll()) is not None:
            raise ServerError(server, f"ended with status {status}")
        with suppress(httpx.TransportError):
            if server.get("/health").is_success:
                return
        time.sleep(0.5)
    raise ServerError(server, f"was not up in {start_s} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end its processes itself; a second Ctrl-C cuts that short."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
