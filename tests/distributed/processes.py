"""Process trees that tests start: all of a tree is found again, whatever its parent is.

A mark in the environment is inherited by all that a process starts, and what is not
started by us does not have it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

MARK = "EMSSD_TEST_MARK"
# vLLM's processes give themselves names, by default written over their environment.
KEEPS_ENVIRONMENT = {"SPT_NOENV": "1"}
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Tree:
    """A process, all that it starts, and its log."""

    command: list[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.shared_memory_before = shared_memory()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=os.environ | self.env | {MARK: self.mark} | KEEPS_ENVIRONMENT,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Even if the tests themselves run under nohup.
                preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
            )

    def members(self) -> list[psutil.Process]:
        """All processes of the tree that are alive."""
        return [p for p in psutil.process_iter() if self._is_member(p)]

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            return is_alive and process.environ().get(MARK) == self.mark
        except psutil.Error:
            return False

    def wait(self, timeout: float) -> int | None:
        """Its exit code; None, and all of it killed, if it takes longer."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def leftovers(self, patience: float = 20.0) -> list[str]:
        """What is still there a while after the process has ended; then killed."""
        wait_for(lambda: not self.members(), patience)
        left = [" ".join(p.cmdline()) or p.name() for p in self.members()]
        self.kill()
        return left

    def segments(self, patience: float = 15.0) -> set[str]:
        """Shared memory that is still there a while after the processes are gone:
        Python's resource trackers remove what killed processes have left."""

        def new() -> set[str]:
            # What a living process uses is not left behind: other engines of the
            # machine, or a process of ours, which `leftovers` tells.
            return shared_memory() - self.shared_memory_before - used_shared_memory()

        wait_for(lambda: not new(), patience)
        return new()

    def kill(self) -> None:
        for process in self.members():
            process.kill()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def shared_memory() -> set[str]:
    """Names of all segments. Intel OpenMP registers each process there and leaves the
    entry behind when the process is killed; it is not ours to count."""
    return {p.name for p in SHARED_MEMORY.iterdir() if not p.name.startswith("__KMP")}


def used_shared_memory() -> set[str]:
    """Names of the segments that some process has mapped."""
    names: set[str] = set()
    for pid in psutil.pids():
        try:
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
        except OSError:
            continue  # it has ended
        names.update(re.findall(rf"{SHARED_MEMORY}/(\S+)$", maps, re.MULTILINE))
    return names


def listeners() -> set[tuple[int | None, int]]:
    """Who on the machine listens on which TCP port: process IDs and ports."""
    connections = psutil.net_connections("tcp")
    return {
        (c.pid, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN
    }
