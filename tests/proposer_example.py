"""The worked example of CONTRIBUTING.md, installed as a newcomer would."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "CONTRIBUTING.md"
MAX_LINES = 40


def block_of(filename: str) -> str:
    """The fenced block below the line that names the file."""
    found = re.search(
        rf"^`{re.escape(filename)}`\n\n```\w+\n(.*?)^```$",
        DOCUMENT.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert found is not None, f"{DOCUMENT.name} shows no {filename}"
    return found[1]


def example_name() -> str:
    (name,) = _entry_points()
    return name


def _entry_points() -> dict[str, str]:
    project = tomllib.loads(block_of("pyproject.toml"))["project"]
    return project["entry-points"]["vllm_emssd.proposers"]


@contextmanager
def installed_example(folder: Path) -> Iterator[str]:
    """What `pip install .` would leave, in a folder on the path. Yields its name."""
    project = tomllib.loads(block_of("pyproject.toml"))["project"]
    module = "follower_proposer"
    (folder / f"{module}.py").write_text(block_of(f"{module}.py"))
    metadata = folder / f"{module}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\n"
        f"Version: {project['version']}\n"
    )
    lines = [f"{name} = {value}" for name, value in _entry_points().items()]
    (metadata / "entry_points.txt").write_text(
        "\n".join(["[vllm_emssd.proposers]", *lines]) + "\n"
    )
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield example_name()
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(module, None)
        importlib.invalidate_caches()
