"""Another release's Python on the installed kernels: choosing, checking, assembling."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from scripts.compat import release
from scripts.compat.release import choose, new_folder, source_of, supported


def file(name: str, yanked: bool | str = False) -> dict[str, Any]:
    """A file as the package index lists it."""
    return {"filename": name, "yanked": yanked}


FILES = [
    file("vllm-0.32.0.tar.gz"),
    file("vllm-0.33.1.tar.gz", yanked="does not start"),
    file("vllm-0.33.0.tar.gz"),
    file("vllm-0.33.2-cp38-abi3-manylinux1_x86_64.whl"),
    file("vllm-0.99.0.tar.gz"),
    file("vllm-1.0.0rc1.tar.gz"),
]


@pytest.mark.parametrize(
    ("which", "version"),
    [
        ("0.32.0", "0.32.0"),
        ("0.33.1", "0.33.1"),  # yanked, but named
        ("supported", "0.33.0"),
        ("latest", "0.99.0"),
    ],
)
def test_choice(which: str, version: str) -> None:
    chosen, source = choose(which, FILES)
    assert str(chosen) == version
    assert source["filename"] == f"vllm-{version}.tar.gz"


def test_version_that_the_index_has_no_source_of() -> None:
    with pytest.raises(RuntimeError, match="no source"):
        choose("0.33.2", FILES)


def test_supported_is_what_the_plugin_checks_at_its_start() -> None:
    from vllm_emssd.integration.hooks.compat import SUPPORTED_VLLM

    assert supported() == SUPPORTED_VLLM


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(release, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.usefixtures("cache")
def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*args: Any, **kwargs: Any) -> Any:
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests.Session, "get", get)
    with pytest.raises(RuntimeError, match=r"no route to host.*PIP_INDEX_URL"):
        source_of("latest")


def archive() -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as tar:
        for name in ("vllm/a.py", "tests/test_a.py", "csrc/big.cpp"):
            tar.addfile(tarfile.TarInfo(f"vllm-9.9.0/{name}"))
    return written.getvalue()


def test_source_is_fetched_once_and_checked(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive()
    listed = {"filename": "vllm-9.9.0.tar.gz", "yanked": False, "url": "https://x/y"}
    answer = SimpleNamespace(content=content, json=lambda: {"files": [listed]})
    monkeypatch.setattr(release, "_get", lambda *args: answer)
    listed["hashes"] = {"sha256": "00"}
    with pytest.raises(RuntimeError, match="not what"):
        source_of("9.9.0")
    assert not cache.exists()
    listed["hashes"] = {"sha256": hashlib.sha256(content).hexdigest()}
    version, folder = source_of("9.9.0")
    assert version == "9.9.0"
    unpacked = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
    assert sorted(unpacked) == ["tests/test_a.py", "vllm/a.py"]
    monkeypatch.delattr(release, "_get")
    assert source_of("9.9.0") == (version, folder)


def test_folder_is_there_whole_or_not_at_all(cache: Path) -> None:
    def stopped() -> None:
        with new_folder(cache / "kept") as made:
            (made / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(cache.iterdir()) == []
    for _ in range(2):  # the second as if another process had been faster
        with new_folder(cache / "kept") as made:
            (made / "whole").touch()
    assert [path.name for path in (cache / "kept").iterdir()] == ["whole"]


def test_assembled_vllm_is_the_release_with_the_kernels(tmp_path: Path) -> None:
    source, kernels, made = (tmp_path / name for name in ("source", "kernels", "made"))
    (source / "vllm/sub").mkdir(parents=True)
    (source / "vllm/_version.py").write_text("__version__ = '9.9.0'\n")
    (source / "vllm/sub/code.py").write_text("new = True")
    (kernels / "sub").mkdir(parents=True)
    (kernels / "_C.abi3.so").write_bytes(b"compiled")
    (kernels / "sub/_D.so").write_bytes(b"compiled too")
    (kernels / "sub/code.py").write_text("old = True")
    release.assemble(source, "9.9.0", kernels, made)
    written: dict[str, Any] = {}
    exec((made / "vllm/_version.py").read_text(), written)
    assert written["__version__"] == "9.9.0+cpu"
    assert written["__version_tuple__"][:2] == (9, 9)
    assert (made / "vllm/sub/code.py").read_text() == "new = True"
    assert (made / "vllm/_C.abi3.so").read_bytes() == b"compiled"
    assert (made / "vllm/sub/_D.so").read_bytes() == b"compiled too"
    metadata = (made / "vllm-9.9.0+cpu.dist-info/METADATA").read_text()
    assert "Version: 9.9.0+cpu\n" in metadata


def test_installed_version_is_the_build_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32.0's own Python files do not run on CPUs; the build fixed them."""
    kernels = Path("site-packages/vllm")
    monkeypatch.setattr(release, "source_of", lambda which: (which, Path("source")))
    monkeypatch.setattr(release, "installed_kernels", lambda: ("9.9.0", kernels))
    assert release.prepared("9.9.0").folder == Path("site-packages")


def test_an_environment_without_pip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """uv makes such ones."""
    monkeypatch.setattr(release, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="Install it: uv pip install"):
        release.pip("tblib")
