"""Another release's Python on the installed kernels: choosing, checking, assembling."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import requests

from scripts import vllm_release
from scripts.vllm_release import Index, Source, choose, is_complete, sources, supported

URL = "https://index.example/simple/vllm/"
PAGE = """
<a href="../../files/vllm-0.32.0.tar.gz#sha256=aa">vllm-0.32.0.tar.gz</a>
<a href="../../files/vllm-0.33.1.tar.gz#sha256=bb" data-yanked="">vllm-0.33.1.tar.gz</a>
<a href="../../files/vllm-0.33.0.tar.gz#sha256=cc">vllm-0.33.0.tar.gz</a>
<a href="../../files/vllm-0.33.0-py3-none-any.whl#sha256=dd">a wheel</a>
<a href="../../files/vllm-0.99.0.tar.gz#sha256=ee">vllm-0.99.0.tar.gz</a>
<a href="../../files/vllm-1.0.0rc1.tar.gz#sha256=ff">vllm-1.0.0rc1.tar.gz</a>
<a href="../../files/vllm-0.31.0.tar.gz">no checksum</a>
"""


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
    chosen = choose(which, sources(PAGE, URL))
    assert str(chosen.version) == version
    assert chosen.url == f"https://index.example/files/vllm-{version}.tar.gz"


@pytest.mark.parametrize("which", ["0.31.0", "0.33.7"])
def test_version_that_the_index_lacks(which: str) -> None:
    with pytest.raises(RuntimeError, match=f"no source of vLLM {which}"):
        choose(which, sources(PAGE, URL))


def test_supported_is_what_the_plugin_checks_at_its_start() -> None:
    from vllm_emssd.integration.hooks.compat import SUPPORTED_VLLM

    assert supported() == SUPPORTED_VLLM


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*args: Any, **kwargs: Any) -> Any:
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests.Session, "get", get)
    with pytest.raises(RuntimeError, match=r"no route to host.*PIP_INDEX_URL"):
        Index().sources()


class Answer:
    content = b"an archive"

    def raise_for_status(self) -> None: ...


def test_download_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests.Session, "get", lambda *args, **kwargs: Answer())
    [source, *_] = sources(PAGE, URL)
    with pytest.raises(RuntimeError, match="the index says aa"):
        Index().download(source, tmp_path / "file")
    digest = hashlib.sha256(Answer.content).hexdigest()
    right = Source(source.version, source.url, digest, is_yanked=False)
    Index().download(right, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == Answer.content


def test_folder_is_kept_whole_or_made_anew(tmp_path: Path) -> None:
    made, kept = tmp_path / "made", tmp_path / "kept"
    (made / "vllm").mkdir(parents=True)
    (made / "vllm/a.py").write_text("a = 1")
    kept.mkdir()
    (kept / "left-by-a-stopped-run").touch()
    assert not is_complete(kept)
    vllm_release._keep(made, kept)
    assert is_complete(kept)
    (kept / "vllm/a.pyc").touch()  # compiled by a run
    assert is_complete(kept)
    (kept / "vllm/a.py").write_text("a = 2")
    assert not is_complete(kept)


def test_assembled_vllm_is_the_release_with_the_kernels(tmp_path: Path) -> None:
    source, kernels, made = (tmp_path / name for name in ("source", "kernels", "made"))
    (source / "vllm/sub").mkdir(parents=True)
    (source / "vllm/_version.py").write_text("__version__ = version = '9.9.0'\n")
    (source / "vllm/sub/code.py").write_text("new = True")
    (kernels / "sub").mkdir(parents=True)
    (kernels / "_C.abi3.so").write_bytes(b"compiled")
    (kernels / "sub/_D.so").write_bytes(b"compiled too")
    (kernels / "sub/code.py").write_text("old = True")
    vllm_release.assemble(source, "9.9.0", kernels, made)
    assert (made / "vllm/_version.py").read_text().count("'9.9.0+cpu'") == 1
    assert (made / "vllm/sub/code.py").read_text() == "new = True"
    assert (made / "vllm/_C.abi3.so").read_bytes() == b"compiled"
    assert (made / "vllm/sub/_D.so").read_bytes() == b"compiled too"
    metadata = (made / "vllm-9.9.0+cpu.dist-info/METADATA").read_text()
    assert "Version: 9.9.0+cpu\n" in metadata


def test_what_the_release_needs_more(tmp_path: Path) -> None:
    (tmp_path / "common.txt").write_text(
        "# a comment\n-r other.txt\npytest >= 1  # there\ntorch == 99\n"
        'no-such-package >= 3\nnever-here; python_version < "3"\npytest >= 9999\n'
    )
    missing = vllm_release.missing_requirements(tmp_path)
    assert missing == ["no-such-package>=3", "pytest>=9999"]
