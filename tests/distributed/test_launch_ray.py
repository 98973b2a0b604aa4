"""scripts/launch_ray.py refuses what cannot work; Ray on a CPU is for tests."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.distributed.engines import REPO
from tests.distributed.ray_on_cpu import emssd_test_platform

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
