"""The distributions: what is in them, and a wheel that works without the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from vllm_emssd.bench import smollm2

ROOT = Path(__file__).parents[2]
MAX_BYTES = 3_000_000  # of the source distribution


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source distribution and wheel, the latter made from the former."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    run(*build, cwd=ROOT)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def clean(
    distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The `bin` of an environment with the wheel in it. All that it needs comes from
    this one, read after its own packages, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps")
    run(*install, distributions[1], cwd=folder)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_metadata(distributions: tuple[Path, Path]) -> None:
    check = (sys.executable, "-m", "twine", "check", "--strict", *distributions)
    assert run(*check, cwd=ROOT).count("PASSED") == 2


def test_source_distribution_is_small(distributions: tuple[Path, Path]) -> None:
    source, _ = distributions
    assert source.stat().st_size < MAX_BYTES
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "mkdocs.yml", "vllm_emssd/__init__.py"} <= names
    assert not any(name.startswith("models/") for name in names)


def test_wheel_is_what_runs(clean: Path, tmp_path: Path) -> None:
    code = "import vllm_emssd; print(vllm_emssd.__file__)"
    found = run(clean / "python", "-c", code, cwd=tmp_path, PYTHONPATH="")
    assert Path(found.strip()).is_relative_to(clean.parent)


@pytest.mark.slow
def test_doctor_of_the_wheel(clean: Path, tmp_path: Path) -> None:
    doctor = clean / "vllm-emssd"
    found = run(doctor, "doctor", cwd=tmp_path, PYTHONPATH="", LD_PRELOAD="")
    assert 'vLLM knows "method": "emssd"' in found
    assert "wrong" not in found


def test_simulate_of_the_wheel(clean: Path, tmp_path: Path) -> None:
    """It brings its trace and cost tables."""
    command = [clean / "vllm-emssd", "simulate", "predict", "--max-concurrency", "2"]
    command += ["--fixed", "3", "--output-len", "8", "--num-prompts", "2"]
    command += ["--output-json", tmp_path / "predicted.json"]
    run(*command, cwd=tmp_path, PYTHONPATH="")
    predicted = json.loads((tmp_path / "predicted.json").read_text())
    assert {"plain", "auto"} <= {one["method"] for one in predicted["results"]}


@pytest.mark.parametrize(
    ("command", "says"),
    [("bench", "throughput"), ("doctor", "--hooks"), ("serve", "--dry-run")],
)
def test_commands_of_the_wheel_explain_themselves(
    command: str, says: str, clean: Path, tmp_path: Path
) -> None:
    shown = run(clean / "vllm-emssd", command, "--help", cwd=tmp_path, PYTHONPATH="")
    assert says in shown


@pytest.mark.slow
def test_bench_of_the_wheel_needs_no_models_of_the_repository(
    clean: Path, tmp_path: Path
) -> None:
    try:
        smollm2.fetch()
    except smollm2.FetchError as error:
        pytest.skip(str(error))
    command = [clean / "vllm-emssd", "bench", "throughput", "--enforce-eager"]
    command += ["--max-concurrency", "2", "--output-len", "8", "--num-iters", "1"]
    command += ["--kv-cache-memory-bytes", "64M", "--output-json", tmp_path / "out"]
    run(*command, cwd=tmp_path, PYTHONPATH="")
    result = json.loads((tmp_path / "out").read_text())
    assert result["workload"]["name"] == "chats"
    assert {"plain", "llma-auto"} <= result["results"][0]["methods"].keys()
