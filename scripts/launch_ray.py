"""Start Ray on this machine, join another machine's, or serve over it.

Each command runs in the foreground until it is stopped (Ctrl-C, SIGTERM, its terminal
closed) or what it started ends, and then stops all it started; other Ray clusters of
the machine are left alone. Token authentication is on, as anyone who reaches Ray's
ports could run code otherwise: all machines need the same token file.
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
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from packaging.version import Version

FIRST_RAY_WITH_TOKENS = Version("2.52")
READY_SECONDS, STOP_SECONDS = 90, 20
TOKEN_FILE = Path.home() / ".ray" / "auth_token"  # Ray's own default
BIN = Path(sys.executable).parent
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class LaunchError(Exception):
    """What cannot work; the message says what to do."""


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # its terminal may be closed
        print(f"[launch_ray] {text}", file=sys.stderr, flush=True)


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
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    head = commands.add_parser("head", help="start Ray's first node")
    worker = commands.add_parser("worker", help="add this machine to a head's cluster")
    serve = commands.add_parser(
        "serve", help="run `vllm serve` over Ray; it gets all other flags"
    )
    serve.add_argument("target", metavar="TARGET", help="the model to serve")
    worker.add_argument("--head", required=True, metavar="IP:PORT")
    serve.add_argument("--head", metavar="IP:PORT", help="default: start one here")
    serve.add_argument("--data-parallel-size", "-dp", type=int, default=1)
    for one in (head, worker, serve):
        one.allow_abbrev, add = False, one.add_argument
        add("--address", default=own_address(), help="this machine's (%(default)s)")
        add("--num-gpus", type=int, help="default: what Ray finds")
        add("--num-cpus", type=int, help="default: what Ray finds")
        add("--ray-port", type=int, default=6379, help="of a head (%(default)s)")
        add("--token-file", type=Path, default=TOKEN_FILE, help="a head makes it")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    args.starts_head = args.command == "head" or not args.head
    args.head = f"{args.address}:{args.ray_port}" if args.starts_head else args.head
    return args, rest


def prepare(args: argparse.Namespace) -> None:
    """What Ray and vLLM read from the environment. Raises LaunchError."""
    try:
        has_tokens = Version(version("ray")) >= FIRST_RAY_WITH_TOKENS
    except PackageNotFoundError:
        has_tokens = False
    if not has_tokens:
        wanted = f"ray[default]>={FIRST_RAY_WITH_TOKENS}"
        raise LaunchError(f"Ray with authentication is needed: pip install '{wanted}'")
    path = args.token_file
    if not path.exists():
        if not args.starts_head:
            raise LaunchError(f"{path} is missing: copy it from the head's machine")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        path.write_text(secrets.token_hex(32))
        say(f"made {path}; the cluster's other machines need a copy")
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(path.resolve()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_HOST_IP": args.address,
    }


# ---------------------------------------------------------------- processes


def start_ray(args: argparse.Namespace) -> psutil.Process:
    """A node of Ray that answers: the raylet, an orphan that is ours. Raises
    LaunchError."""
    where = ["--address", args.head]
    if args.starts_head:
        where = ["--head", "--port", str(args.ray_port)]
    command = [str(BIN / "ray"), "start", *where, "--disable-usage-stats"]
    command += ["--node-ip-address", args.address]
    for flag, number in (("--num-gpus", args.num_gpus), ("--num-cpus", args.num_cpus)):
        command += [] if number is None else [flag, str(number)]
    say(shlex.join(command))
    try:
        subprocess.run(
            command, check=True, timeout=READY_SECONDS,
            stdout=sys.stderr, start_new_session=True,
        )  # fmt: skip
    except subprocess.CalledProcessError:
        raise LaunchError("Ray did not start; see its output above") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"Ray does not answer at {args.head}") from None
    return next(p for p in psutil.Process().children() if p.name() == "raylet")


def start_serve(args: argparse.Namespace, rest: list[str]) -> psutil.Process:
    """In a session of its own, so that Ctrl-C reaches this process alone."""
    command = [str(BIN / "vllm"), "serve", args.target, *rest]
    command += ["--distributed-executor-backend", "ray"]
    if args.data_parallel_size > 1:
        command += ["--data-parallel-size", str(args.data_parallel_size)]
        command += ["--data-parallel-backend", "ray"]
    say(f"RAY_ADDRESS={args.head} {shlex.join(command)}")
    environment = os.environ | {"RAY_ADDRESS": args.head}
    return psutil.Popen(command, env=environment, start_new_session=True)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stop_all(first: list[psutil.Process]) -> None:
    """Ask each of `first` to end what it has started, then end all that is left."""
    for process in first:
        _end([process], psutil.Process.terminate)
    for end in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
        _end(psutil.Process().children(recursive=True), end)


def _end(processes: list[psutil.Process], end: Callable[[Any], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            end(process)
    psutil.wait_procs(processes, timeout=STOP_SECONDS)


class SharedMemory:
    """Segments that processes started from here have mapped.

    vLLM's executor kills its Ray workers, which so leave theirs behind: one that no
    process has mapped any more is removed. What processes have mapped is long to read:
    it is read of those started from here when a segment is new, and of all when those
    that had a segment mapped are gone.
    """

    FOLDER = Path("/dev/shm")
    NAMES = re.compile(r"psm_\w+|\S+-cpushm_\d+")
    LOOKS = 3  # at a new segment, as a process may still be about to map it

    def __init__(self) -> None:
        self._users: dict[str, list[psutil.Process]] = {}  # of our segments
        self._looks: Counter[str] = Counter()  # at each segment that there is

    def sweep(self) -> None:
        names = {p.name for p in self.FOLDER.iterdir() if self.NAMES.fullmatch(p.name)}
        self._looks = Counter({name: self._looks[name] + 1 for name in names})
        new = {name for name in names if self._looks[name] <= self.LOOKS}
        if new - self._users.keys():
            started_here = psutil.Process().children(recursive=True)
            self._users |= self.users(new, started_here)
        for name, users in list(self._users.items()):
            if not any(map(is_alive, users)):
                users = self.users({name}, psutil.process_iter()).get(name, [])
                self._users[name] = users
            if not users:
                (self.FOLDER / name).unlink(missing_ok=True)
                del self._users[name]

    def users(
        self, names: set[str], processes: Iterable[psutil.Process]
    ) -> dict[str, list[psutil.Process]]:
        """Those of the processes that have each segment mapped, if any has."""
        found: dict[str, list[psutil.Process]] = {}
        for process in processes:
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            except OSError:
                continue  # it has ended, or is another user's
            mapped = re.findall(rf"{self.FOLDER}/(\S+)$", maps, re.MULTILINE)
            for name in names & {*mapped}:
                found.setdefault(name, []).append(process)
        return found


# ---------------------------------------------------------------- the command


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Returns the exit code of what ended by itself. Raises LaunchError."""
    memory, started = SharedMemory(), []
    try:
        if args.command != "serve" or args.starts_head:
            started.append(start_ray(args))
        if args.command == "serve":
            started.append(start_serve(args, rest))
        else:
            say(f"ready; the head is {args.head}. Ctrl-C stops this node")
        while all(map(is_alive, started)):
            memory.sweep()
            time.sleep(1)
        ended = next(process for process in started if not is_alive(process))
        code = ended.wait() or 0
        say(f"process {ended.pid} ended with exit code {code}")
        return code if code >= 0 else 128 - code
    finally:
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_IGN)
        memory.sweep()
        stop_all(started[::-1])
        memory.sweep()


def main() -> int:
    args, rest = parse(sys.argv[1:])
    if sys.platform == "linux":  # whatever is started from here stays a descendant
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for stop in STOP_SIGNALS:
        # Under nohup a closed terminal is not to stop it. SIGINT is ignored in a
        # shell's background jobs, which must end all the same.
        if stop != signal.SIGHUP or signal.getsignal(stop) != signal.SIG_IGN:
            signal.signal(stop, signal.default_int_handler)
    try:
        prepare(args)
        return run(args, rest)
    except LaunchError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 0


if __name__ == "__main__":
    sys.exit(main())
