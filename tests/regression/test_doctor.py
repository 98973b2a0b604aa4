"""`vllm-emssd doctor`: what it finds, what it advises, how it ends."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

import vllm_emssd
from tests.fresh_process import python
from tests.without_hooks import without
from vllm_emssd import cli
from vllm_emssd.commands import doctor
from vllm_emssd.integration import doctor as checks
from vllm_emssd.integration import hook_inventory
from vllm_emssd.integration.doctor import Finding, State
from vllm_emssd.integration.frontend.method import FRONTEND_HOOK
from vllm_emssd.integration.hook_inventory import INVENTORY, describe
from vllm_emssd.integration.hooks import compat
from vllm_emssd.integration.hooks.hook import is_installed


@pytest.fixture(scope="module")
def found() -> dict[str, Finding]:
    return {finding.about: finding for finding in doctor.findings()}


def test_this_environment_can_serve(found: dict[str, Finding]) -> None:
    wrong = {f.about for f in found.values() if f.state is State.WRONG}
    assert wrong <= {"compiler"}, "the tests compile nothing"
    assert found["plugin"].state is State.OK
    assert found["plugin, new process"].state is State.OK
    assert set(found) >= {"vllm-emssd", "vllm", "python", "torch", "device", "hooks"}
    assert ("kernels" in found) == found["device"].found.startswith("CPU")


def test_whatever_is_not_right_says_what_to_change(found: dict[str, Finding]) -> None:
    for finding in found.values():
        assert bool(finding.fix) == (finding.state is not State.OK)


def test_a_disabled_plugin_ends_with_1() -> None:
    done = python("-m", "vllm_emssd", "doctor", VLLM_PLUGINS="")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "wrong  plugin: vLLM does not know" in done.stdout
    assert "wrong  plugin, new process: vLLM does not know" in done.stdout
    assert "unset it, or add emssd" in done.stdout


BROKEN = {
    "torch": "raise OSError('libc10.so: cannot open shared object file')",
    "vllm": "import nonesuch",
    "vllm.plugins": "raise RuntimeError('Failed to import transformers')",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_installation_is_a_row(name: str, tmp_path: Path) -> None:
    module = tmp_path / name.replace(".", "/")
    module.mkdir(parents=True)
    for package in (tmp_path / "vllm", module):
        if package.is_dir():
            (package / "__init__.py").write_text("__version__ = '0.32.0'")
    (module / "__init__.py").write_text(BROKEN[name])
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = python("-m", "vllm_emssd", "doctor", PYTHONPATH=path)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert len(rows) == 1
    assert rows[0].startswith(f"wrong  {name.split('.')[0]}: ")


def test_no_vllm_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "wrong  vllm: is not installed" in out
    assert "pip install 'vllm-emssd[vllm]'" in out


def test_a_check_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_device() -> Finding:
        raise OSError("no driver")

    monkeypatch.setattr(checks, "_checks", lambda: iter([check_device]))
    [finding] = [f for f in checks.findings() if f.about == "check device"]
    assert finding.state is State.WRONG
    assert "no driver" in finding.found


@pytest.mark.parametrize("version", ["dev", "0.1.dev1+g1234567"])
def test_a_version_that_says_nothing(version: str) -> None:
    with pytest.raises(RuntimeError, match="VLLM_VERSION_OVERRIDE"):
        compat.check_vllm_version(version)


def test_an_unsupported_vllm_leaves_the_plugin_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(compat.vllm, "__version__", "0.31.0")
    monkeypatch.setattr(
        "logging.Logger.warning", lambda log, text, *args: warnings.append(text % args)
    )
    with without(INVENTORY):
        vllm_emssd.register()
        assert not is_installed(INVENTORY[0])
    assert 'pip install "vllm==0.32.*"' in warnings[-1]


@pytest.mark.parametrize(
    ("states", "flags", "code"),
    [
        ([State.OK, State.OK], [], 0),
        ([State.OK, State.SLOW], [], 0),
        ([State.OK, State.SLOW], ["--strict"], 1),
        ([State.WRONG, State.OK], [], 1),
        ([State.OK], ["--strict"], 0),
    ],
)
def test_exit_code(
    states: list[State],
    flags: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    findings = [Finding("it", s, "so", "" if s is State.OK else "that") for s in states]
    monkeypatch.setattr(doctor, "findings", lambda: findings)
    assert cli.main(["doctor", *flags]) == code
    out = capsys.readouterr().out
    assert out.count("change: that") == sum(s is not State.OK for s in states)


def test_hooks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--hooks"]) == 0
    out = capsys.readouterr().out
    for hook in INVENTORY:
        assert hook.target in out
    assert describe(FRONTEND_HOOK) in out
    assert is_installed(FRONTEND_HOOK)


def test_vllm_outside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.vllm, "__version__", "0.31.0")
    finding = checks.check_version()
    assert finding.state is State.WRONG
    assert 'pip install "vllm==0.32.*"' in finding.fix


def test_no_distribution_called_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = checks.check_distribution_name()
    assert finding.state is State.WRONG
    assert "vllm-emssd serve" in finding.fix
    assert "packaging/vllm-name" in finding.fix


@pytest.mark.parametrize(
    ("cxx", "path", "state"),
    [
        ("g++", "/usr/bin/g++", State.OK),
        ("g++", None, State.WRONG),
        ("none-such", "/usr/bin/g++", State.WRONG),
    ],
)
def test_compiler(
    cxx: str, path: str | None, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr(checks.shutil, "which", {"g++": path}.get)
    finding = checks.check_compiler()
    assert finding.state is state
    assert ("--enforce-eager" in finding.fix) == (state is State.WRONG)


def test_kernels_that_do_not_load(tmp_path: Path) -> None:
    """As in a container without libnuma."""
    (tmp_path / "libnuma.so.1").touch()
    code = "from vllm_emssd.integration import doctor; "
    code += "print(doctor.check_cpu_kernels())"
    found = python("-c", code, LD_LIBRARY_PATH=str(tmp_path)).stdout
    assert "State.WRONG" in found
    assert "libnuma1" in found


def test_plugin_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    finding = checks.check_plugin_here()
    assert finding.state is State.WRONG
    assert "pip install vllm-emssd" in finding.fix


def test_a_hook_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    drifted = dataclasses.replace(INVENTORY[0], signature="self, other")
    monkeypatch.setattr(hook_inventory, "INVENTORY", (drifted,))
    with without(INVENTORY):
        finding = checks.check_hooks()
    assert finding.state is State.WRONG
    assert "expected (self, other)" in finding.fix


@pytest.mark.parametrize(
    ("preload", "state", "advice"),
    [
        ("/a/libiomp5.so:/a/libtcmalloc_minimal.so.4", State.OK, ""),
        ("/a/libiomp5.so", State.SLOW, "libtcmalloc-minimal4"),
        ("/a/libtcmalloc.so", State.SLOW, "pip install intel-openmp"),
    ],
)
def test_preloads(
    preload: str, state: State, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", preload)
    monkeypatch.setattr(checks, "find_preloads", list)
    finding = checks.check_preloads()
    assert finding.state is state
    assert advice in finding.fix


def test_preloads_that_are_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    paths = [Path("/v/libiomp5.so"), Path("/u/libtcmalloc_minimal.so.4")]
    monkeypatch.setattr(checks, "find_preloads", lambda: paths)
    fix = checks.check_preloads().fix
    assert fix.endswith("LD_PRELOAD=/v/libiomp5.so:/u/libtcmalloc_minimal.so.4")


@pytest.mark.parametrize(
    ("bind", "threads", "cpus", "state", "advice"),
    [
        ("auto", "2", 2, State.SLOW, "nobind OMP_NUM_THREADS=2"),
        ("auto", "2", 64, State.OK, ""),
        ("nobind", "2", 2, State.OK, ""),
        ("nobind", "9", 2, State.SLOW, "OMP_NUM_THREADS=2"),
        ("0-1", "9", 2, State.OK, ""),
    ],
)
def test_threads(
    bind: str,
    threads: str,
    cpus: int,
    state: State,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(checks, "num_cpus", lambda: cpus)
    finding = checks.check_threads()
    assert finding.state is state
    assert advice in finding.fix
