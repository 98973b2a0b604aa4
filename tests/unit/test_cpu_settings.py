"""`vllm-emssd serve`: what it adds to the environment, and what it becomes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_emssd import cli
from vllm_emssd.commands import serve
from vllm_emssd.integration.cpu import settings as cpu_settings

IOMP, TCMALLOC = "/lib/libiomp5.so", "/lib/libtcmalloc_minimal.so.4"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [Path(IOMP), Path(TCMALLOC)]
    monkeypatch.setattr(cpu_settings, "find_preloads", lambda: paths)


@pytest.mark.parametrize(
    ("given", "cpus", "added"),
    [
        (
            {},
            2,
            {
                "LD_PRELOAD": f"{IOMP}:{TCMALLOC}",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": "2",
                "THP_MEM_ALLOC_ENABLE": "1",
            },
        ),
        (  # vLLM binds threads itself
            {"THP_MEM_ALLOC_ENABLE": "0"},
            64,
            {"LD_PRELOAD": f"{IOMP}:{TCMALLOC}"},
        ),
        (
            {"LD_PRELOAD": "/mine.so", "VLLM_CPU_OMP_THREADS_BIND": "0-1"},
            4,
            {
                "LD_PRELOAD": f"{IOMP}:{TCMALLOC}:/mine.so",
                "THP_MEM_ALLOC_ENABLE": "1",
            },
        ),
        (
            {"LD_PRELOAD": "/opt/libtcmalloc.so", "OMP_NUM_THREADS": "1"},
            2,
            {
                "LD_PRELOAD": f"{IOMP}:/opt/libtcmalloc.so",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "THP_MEM_ALLOC_ENABLE": "1",
            },
        ),
        (
            {
                "LD_PRELOAD": f"{TCMALLOC}:{IOMP}",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            },
            64,
            {"OMP_NUM_THREADS": "64", "THP_MEM_ALLOC_ENABLE": "1"},
        ),
    ],
)
def test_adds_what_is_not_set(
    given: dict[str, str],
    cpus: int,
    added: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_settings, "num_cpus", lambda: cpus)
    monkeypatch.setattr(cpu_settings, "cpu_quota", lambda: None)
    assert cpu_settings.settings_here(given) == added


def test_nothing_installed_preloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_settings, "find_preloads", list)
    assert "LD_PRELOAD" not in cpu_settings.settings_here({})


@pytest.mark.parametrize(
    ("folder", "can_be_named"), [("environment", True), ("an environment", False)]
)
def test_finds_the_libraries_of_an_environment(
    folder: str, can_be_named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """LD_PRELOAD takes a space for the end of a path."""
    monkeypatch.undo()
    library = tmp_path / folder / "lib" / "libiomp5.so"
    assert library not in cpu_settings.find_preloads(str(tmp_path / folder))
    library.parent.mkdir(parents=True)
    library.touch()
    found = cpu_settings.find_preloads(str(tmp_path / folder))
    assert (library in found) == can_be_named


def cgroup(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("own", "place", "files", "quota"),
    [
        ("0::/", "", {"cpu__max": "200000 100000\n"}, 2.0),
        ("0::/", "", {"cpu__max": "max 100000\n"}, None),
        ("0::/a/b", "a", {"cpu__max": "150000 100000\n"}, 1.5),  # of a parent
        ("0::/not/seen/from/inside", "", {"cpu__max": "50000 100000\n"}, 0.5),
        (
            "4:memory:/m\n3:cpu,cpuacct:/docker/x\n0::/",
            "cpu/docker/x",
            {"cpu__cfs_quota_us": "300000", "cpu__cfs_period_us": "100000"},
            3.0,
        ),
        (
            "3:cpu,cpuacct:/",
            "cpu",
            {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"},
            None,
        ),
        ("3:cpuset:/", "cpuset", {"cpu__max": "1 1"}, None),
    ],
)
def test_quota_of_a_container(
    own: str, place: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    cgroup(tmp_path / "groups" / place, **files)
    assert cpu_settings.cpu_quota(tmp_path / "groups", tmp_path / "own") == quota


def test_the_lowest_of_nested_quotas(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/a/b\n")
    cgroup(tmp_path / "groups" / "a", cpu__max="200000 100000")
    cgroup(tmp_path / "groups" / "a" / "b", cpu__max="400000 100000")
    assert cpu_settings.cpu_quota(tmp_path / "groups", tmp_path / "own") == 2.0


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert cpu_settings.cpu_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("quota", "count"), [(None, 64), (2.5, 2), (0.5, 1), (100.0, 64)]
)
def test_cpus_are_those_whose_time_is_ours(
    quota: float | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(cpu_settings, "cpu_quota", lambda: quota)
    assert cpu_settings.num_cpus() == count


def test_under_a_quota_threads_are_counted_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM would bind one to each CPU of the machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(cpu_settings, "cpu_quota", lambda: 16.0)
    added = cpu_settings.settings_here({})
    assert added["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert added["OMP_NUM_THREADS"] == "16"


def test_lines_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_settings, "find_preloads", lambda: [Path("/it's/libiomp5")])
    monkeypatch.setattr(cpu_settings, "num_cpus", lambda: 2)
    monkeypatch.setattr(cpu_settings, "cpu_quota", lambda: None)
    lines = cpu_settings.exports({"OMP_NUM_THREADS": "1"}).splitlines()
    assert lines == [
        """export LD_PRELOAD='/it'"'"'s/libiomp5'""",
        "export VLLM_CPU_OMP_THREADS_BIND=nobind",
        "export THP_MEM_ALLOC_ENABLE=1",
    ]


class BecameVllmError(Exception):
    """Raised in place of an exec, which does not return."""


def exec_of(
    monkeypatch: pytest.MonkeyPatch, *args: str
) -> tuple[str, list[str], dict[str, str]]:
    seen: list[Any] = []

    def execve(*call: Any) -> None:
        seen.extend(call)
        raise BecameVllmError

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(BecameVllmError):
        cli.main(["serve", *args])
    return seen[0], seen[1], dict(seen[2])


VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def test_becomes_vllm_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(cpu_settings, "num_cpus", lambda: 2)
    monkeypatch.setattr(os, "environ", {"HOME": "/root"})
    options = ["--speculative-config", '{"method":"emssd"}', "--port", "1", "--help"]
    program, command, environment = exec_of(monkeypatch, "target", *options)
    assert program == sys.executable
    assert command == [*VLLM, "target", *options]
    assert environment["LD_PRELOAD"] == f"{IOMP}:{TCMALLOC}"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["HOME"] == "/root"


def test_changes_nothing_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "has_nvidia_gpu", lambda: True)
    before = dict(os.environ)
    assert exec_of(monkeypatch, "target")[2] == before


def test_dry_run_says_what_it_would_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execve", None)
    monkeypatch.setattr(serve, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(os, "environ", {})
    assert cli.main(["serve", "--dry-run", "a model"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"LD_PRELOAD={IOMP}:{TCMALLOC} ")
    assert line.endswith("vllm.entrypoints.cli.main serve 'a model'\n")
