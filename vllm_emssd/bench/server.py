"""A `vllm serve` process of one method, gone with all its children at the end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_emssd.bench.engine_process import (
    CPU_FIXES_SWITCH,
    EngineError,
    EngineOptions,
)
from vllm_emssd.bench.methods import Method

START_S = 300
STOP_S = 20
LOG_LINES = 15  # of a server that failed, shown with the error


@dataclass(frozen=True, slots=True)
class Server:
    method: Method
    base_url: str
    log: Path


@contextmanager
def serving(method: Method, options: EngineOptions, folder: Path) -> Iterator[Server]:
    """A healthy server. Raises EngineError with the end of its log if it fails."""
    port = _free_port()
    server = Server(method, f"http://127.0.0.1:{port}", folder / f"{method.name}.log")
    command = serve_command(method, options, port)
    server.log.write_text(f"{shlex.join(command)}\n")
    with server.log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=_environment(options),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own group, so that all of it can be ended
        )
    try:
        _wait_until_healthy(server, process)
        yield server
    finally:
        _stop(process)


def vllm_command() -> str:
    """The `vllm` beside this Python."""
    return str(Path(sys.executable).parent / "vllm")


def serve_command(method: Method, options: EngineOptions, port: int) -> Sequence[str]:
    command = [vllm_command(), "serve", options.model, "--port", str(port)]
    command += ["--tokenizer", options.tokenizer, "--dtype", options.dtype]
    command += ["--max-model-len", str(options.max_model_len)]
    command += ["--max-num-seqs", str(options.max_num_seqs)]
    command += ["--kv-cache-memory-bytes", str(options.kv_cache_mib << 20)]
    if options.options.get("enforce_eager", True):
        command += ["--enforce-eager"]
    if not options.options.get("enable_prefix_caching"):
        command += ["--no-enable-prefix-caching"]
    if method.speculative_config is not None:
        command += ["--speculative-config", json.dumps(method.speculative_config)]
    return command


def _environment(options: EngineOptions) -> dict[str, str]:
    fixes = {CPU_FIXES_SWITCH: "1"} if options.fix_cpu_sampling else {}
    return os.environ | {"VLLM_NO_USAGE_STATS": "1"} | fixes


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if (status := process.poll()) is not None:
            raise EngineError(_failure(server, f"ended with status {status}"))
        if _is_healthy(server):
            return
        time.sleep(0.5)
    raise EngineError(_failure(server, f"was not up in {START_S} s"))


def _is_healthy(server: Server) -> bool:
    # No proxy: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
        return opener.open(f"{server.base_url}/health", timeout=5).status == 200
    return False


def _failure(server: Server, what: str) -> str:
    lines = server.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join([f"the server of {server.method.name!r} {what}:", *lines])


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
