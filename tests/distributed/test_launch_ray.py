"""scripts/launch_ray.py refuses what cannot work; Ray on a CPU is for tests."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
import tomllib
from importlib.metadata import entry_points
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

from scripts import launch_ray
from scripts.launch_ray import SharedMemory
from tests.distributed.engines import REPO, RayCluster
from tests.distributed.processes import Tree, wait_for
from tests.distributed.ray_on_cpu import emssd_test_platform
from vllm_emssd.bench.server_process import free_port

pytestmark = pytest.mark.distributed


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "scripts" / "launch_ray.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["worker"], "--head"),
        (["head", "--port", "1"], "unrecognized arguments: --port 1"),
        (["serve"], "TARGET"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = launch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_joining_without_the_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    done = launch("worker", "--head", "127.0.0.1:1", "--token-file", str(token))
    assert done.returncode == 1
    assert f"{token} is missing: copy it from the head's machine" in done.stderr
    assert not token.exists()


def test_a_head_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_ray, "READY_SECONDS", 4)
    address = f"127.0.0.1:{free_port()}"
    args, _ = launch_ray.parse(["worker", "--head", address])
    with pytest.raises(launch_ray.LaunchError, match=f"not answer at {address}"):
        launch_ray.start_ray(args)


def test_under_nohup_it_outlives_its_terminal(tmp_path: Path) -> None:
    """Without, see test_stopping.py."""
    script = str(REPO / "scripts" / "launch_ray.py")
    command = ["nohup", sys.executable, script, "head", "--address", "127.0.0.1"]
    command += ["--ray-port", str(free_port()), "--num-cpus", "1"]
    command += ["--token-file", str(tmp_path / "token")]
    tree = Tree(command, tmp_path / "log", RayCluster.own_environment())
    assert wait_for(lambda: "ready; the head is" in tree.text, 120), tree.text
    tree.process.send_signal(signal.SIGHUP)
    time.sleep(3)
    assert tree.process.poll() is None
    tree.process.terminate()
    assert tree.wait(60) == 0
    assert tree.leftovers(5) == []


HOLDS_A_SEGMENT = """
import sys
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=1)
resource_tracker.unregister(segment._name, "shared_memory")
print(segment.name, flush=True)
sys.stdin.read()
"""


def hold_a_segment() -> tuple[subprocess.Popen[str], Path]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_SEGMENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    return holder, SharedMemory.FOLDER / holder.stdout.readline().strip()


def test_segments_of_killed_workers_are_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is read of any process while all stays as it is."""
    memory = SharedMemory()
    holder, path = hold_a_segment()
    memory.sweep()
    used_by_another = mmap.mmap(os.open(path, os.O_RDWR), 1)
    read: list[set[str]] = []
    users = memory.users
    monkeypatch.setattr(
        memory,
        "users",
        lambda names, processes: read.append(names) or users(names, processes),
    )
    monkeypatch.setattr(SharedMemory, "LOOKS", 0)  # others may be new on this machine
    memory.sweep()
    assert path.exists()
    assert read == []
    holder.kill()  # not waited for: dead, and still a child
    process = psutil.Process(holder.pid)
    assert wait_for(lambda: not launch_ray.is_alive(process), 10)
    memory.sweep()
    assert path.exists()
    used_by_another.close()
    # This process has it mapped no more, but is alive; ask again as if it had ended.
    memory._users[path.name] = [process]
    memory.sweep()
    assert not path.exists()
    holder.wait()


def test_segments_of_others_stay() -> None:
    """Of a process that was not started from here, as this one."""
    segment = shared_memory.SharedMemory(create=True, size=1)
    segment.close()
    memory = SharedMemory()
    memory.sweep()
    memory.sweep()
    assert (SharedMemory.FOLDER / segment.name).exists()
    segment.unlink()


def test_the_test_platform_is_off_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {entry.name for entry in entry_points(group="vllm.platform_plugins")}
    assert "emssd_test_ray_on_cpu" not in names
    monkeypatch.delenv(emssd_test_platform.SWITCH, raising=False)
    assert emssd_test_platform.platform() is None
    monkeypatch.setenv(emssd_test_platform.SWITCH, "0")
    assert emssd_test_platform.platform() is None
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["vllm_emssd"]
    assert "vllm.platform_plugins" not in project["project"]["entry-points"]
