#!/usr/bin/env python3
"""Start Ray on this machine, join another machine's, or serve over it.

Each command runs in the foreground until it is stopped (Ctrl-C, SIGTERM, its terminal
closed) or what it started ends, and then stops all it started, by process id; other Ray
clusters of the machine are left alone. Token authentication is on, as whoever reaches
Ray's ports could run code otherwise: all machines need the same token file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import psutil
from packaging.version import Version

FIRST_RAY_WITH_TOKENS = Version("2.52")
READY_SECONDS = 90
STOP_SECONDS = 20
TOKEN_FILE = Path.home() / ".ray" / "auth_token"  # Ray's own default
BIN = Path(sys.executable).parent
SWEEP_SECONDS = 3
NEW_SECONDS = 60  # of a segment of shared memory
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # its terminal may be closed
        print(f"[launch_ray] {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    say(text)
    sys.exit(1)


# ---------------------------------------------------------------- arguments


def own_address() -> str:
    """Of the interface that leads to other machines; 127.0.0.1 if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("10.255.255.255", 1))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(sock.getsockname()[0])


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and those to hand on to `vllm serve`."""
    everyones = argparse.ArgumentParser(add_help=False)
    everyones.add_argument(
        "--address",
        default=own_address(),
        help="this machine's, as the others reach it (default: %(default)s)",
    )
    everyones.add_argument(
        "--token-file",
        type=Path,
        default=TOKEN_FILE,
        help="a head makes it where it is missing; copy it to the other machines "
        "(default: %(default)s)",
    )
    everyones.add_argument("--num-gpus", type=int, help="default: what Ray finds")
    everyones.add_argument("--num-cpus", type=int, help="default: what Ray finds")
    ray_port = argparse.ArgumentParser(add_help=False)
    ray_port.add_argument(
        "--ray-port", type=int, default=6379, help="of the head (default: %(default)s)"
    )

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, text: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            parents=[everyones, *parents],
            help=text,
            description=text,
            allow_abbrev=False,
        )

    add("head", "Start Ray's first node.", ray_port)
    worker = add("worker", "Add this machine to a head's cluster.")
    worker.add_argument("--head", required=True, metavar="IP:PORT")
    serve = add(
        "serve", "Run `vllm serve` over Ray; it gets all other flags.", ray_port
    )
    serve.add_argument("target", metavar="TARGET", help="the model to serve")
    serve.add_argument("--head", metavar="IP:PORT", help="default: start one here")
    serve.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    serve.add_argument("--data-parallel-size", "-dp", type=int, default=1)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    return args, rest


def check_ray() -> None:
    try:
        found = Version(version("ray"))
    except PackageNotFoundError:
        fail("Ray is not installed: pip install 'vllm-emssd[ray]'")
    if found < FIRST_RAY_WITH_TOKENS:
        fail(
            f"token authentication needs Ray {FIRST_RAY_WITH_TOKENS} or newer, found "
            f"{found}: pip install --upgrade 'ray[default]'"
        )


def prepare_token(path: Path, may_make: bool) -> None:
    if not path.exists():
        if not may_make:
            fail(f"{path} is missing: copy it from the head's machine (--token-file)")
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        say(f"made {path}; the cluster's other machines need a copy")
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path.resolve())


# ---------------------------------------------------------------- processes


def adopt_orphans() -> None:
    """Whatever is started from here stays among our descendants, whoever ends first."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def stop_all(signal_first: list[subprocess.Popen[bytes]]) -> None:
    """Ask these to end, in order; then end all descendants that are left."""
    for process in signal_first:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                say(f"process {process.pid} does not stop; killing it")
                process.kill()
    left = psutil.Process().children(recursive=True)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            try:
                end(process)
            except psutil.NoSuchProcess:
                continue
        _, left = psutil.wait_procs(left, timeout=STOP_SECONDS / 4)
        left += [p for p in psutil.Process().children(recursive=True) if p not in left]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class SharedMemory:
    """Segments that vLLM's workers here have open.

    vLLM's executor kills its Ray workers, which so leave theirs behind: once nobody has
    one of them open any more, it is removed. What a process has open is a long list, so
    it is read of processes started from here when a segment is new, and of all others
    when those that had it open are gone.
    """

    FOLDER = Path("/dev/shm")
    NAMES = re.compile(r"psm_\w+|\S+-cpushm_\d+")

    def __init__(self) -> None:
        self._holders: dict[str, set[int]] = {}  # of our segments: who has them open
        self._first_seen: dict[str, float] = {}  # all segments there are
        self._swept = time.monotonic()

    def sweep(self) -> None:
        now = self._swept = time.monotonic()
        names = {p.name for p in self.FOLDER.iterdir() if self.NAMES.fullmatch(p.name)}
        self._first_seen = {name: self._first_seen.get(name, now) for name in names}
        self._holders = {n: pids for n, pids in self._holders.items() if n in names}
        self._look_for_ours(now)
        for name, pids in list(self._holders.items()):
            alive = set(filter(is_alive, pids))
            if not alive:
                alive = self._who_has_open({name}, psutil.pids()).get(name, set())
            self._holders[name] = alive
            if not alive:
                (self.FOLDER / name).unlink(missing_ok=True)
                del self._holders[name]

    def sweep_now_and_then(self) -> None:
        if time.monotonic() > self._swept + SWEEP_SECONDS:
            self.sweep()

    def _look_for_ours(self, now: float) -> None:
        """Among segments so new that a process may still be about to open them."""
        new = {
            name
            for name, first_seen in self._first_seen.items()
            if name not in self._holders and now - first_seen < NEW_SECONDS
        }
        if new:
            pids = [p.pid for p in psutil.Process().children(recursive=True)]
            self._holders |= self._who_has_open(new, pids)

    def _who_has_open(self, names: set[str], pids: list[int]) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for pid in pids:
            try:
                text = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            except OSError:
                continue  # it has ended, or is another user's
            for path in set(re.findall(rf"{self.FOLDER}/(\S+)$", text, re.MULTILINE)):
                if path in names:
                    found.setdefault(path, set()).add(pid)
        return found


def start_ray(args: argparse.Namespace, where: list[str]) -> subprocess.Popen[bytes]:
    command = [str(BIN / "ray"), "start", *where, "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", args.address]
    for flag, number in (("--num-gpus", args.num_gpus), ("--num-cpus", args.num_cpus)):
        if number is not None:
            command += [flag, str(number)]
    say(shlex.join(command))
    return subprocess.Popen(  # in a session of its own: Ctrl-C reaches us alone
        command, stdout=sys.stderr, stdin=subprocess.DEVNULL, start_new_session=True
    )


def wait_until_ready(ray: subprocess.Popen[bytes], head: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    command = [str(BIN / "ray"), "health-check", "--address", head]
    while subprocess.run(command, capture_output=True).returncode != 0:
        if ray.poll() is not None:
            fail(f"Ray ended with exit code {ray.returncode}; see its output above")
        if time.monotonic() > deadline:
            fail(f"Ray does not answer at {head} after {READY_SECONDS} s")
        time.sleep(0.5)


def start_serve(
    args: argparse.Namespace, head: str, rest: list[str]
) -> subprocess.Popen[bytes]:
    command = [str(BIN / "vllm"), "serve", args.target]
    command += ["--distributed-executor-backend", "ray"]
    command += ["--tensor-parallel-size", str(args.tensor_parallel_size)]
    if args.data_parallel_size > 1:
        command += ["--data-parallel-size", str(args.data_parallel_size)]
        command += ["--data-parallel-backend", "ray"]
        command += ["--data-parallel-address", args.address]
    command += rest
    say(f"RAY_ADDRESS={head} {shlex.join(command)}")
    return subprocess.Popen(
        command, env=os.environ | {"RAY_ADDRESS": head}, start_new_session=True
    )


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Returns the exit code: that of what ended by itself."""
    started: list[subprocess.Popen[bytes]] = []  # the last one is stopped first
    memory = SharedMemory()
    starts_head = args.command == "head" or not args.head
    head = f"{args.address}:{args.ray_port}" if starts_head else args.head
    try:
        if args.command != "serve" or starts_head:
            where = ["--address", head]
            if starts_head:
                where = ["--head", "--port", str(args.ray_port)]
            started.append(ray := start_ray(args, where))
            wait_until_ready(ray, head)
        if args.command == "serve":
            started.append(start_serve(args, head, rest))
        else:
            say(f"ready; the head is {head}. Ctrl-C stops this node")
        while all(process.poll() is None for process in started):
            memory.sweep_now_and_then()
            time.sleep(0.2)
        ended = next(p for p in reversed(started) if p.poll() is not None)
        say(f"process {ended.pid} ended with exit code {ended.returncode}")
        return ended.returncode if ended.returncode >= 0 else 128 - ended.returncode
    finally:
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_IGN)
        memory.sweep()
        stop_all(started[::-1])
        memory.sweep()


def main() -> int:
    args, rest = parse(sys.argv[1:])
    check_ray()
    may_make = args.command == "head" or (args.command == "serve" and not args.head)
    prepare_token(args.token_file, may_make)
    os.environ["VLLM_HOST_IP"] = args.address
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    adopt_orphans()

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    for stop in STOP_SIGNALS:
        # Under nohup a closed terminal is not to stop it. SIGINT is ignored in a
        # shell's background jobs, which must end all the same.
        if stop != signal.SIGHUP or signal.getsignal(stop) != signal.SIG_IGN:
            signal.signal(stop, interrupt)
    try:
        return run(args, rest)
    except KeyboardInterrupt:
        say("stopped")
        return 0


if __name__ == "__main__":
    sys.exit(main())
