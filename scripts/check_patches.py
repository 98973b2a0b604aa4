"""Applies the patches of `patches/` to a copy of a vLLM release and runs their tests.

    scripts/check_patches              the release that they are made against
    scripts/check_patches 0.34.0       another one

Each patch applies by itself, and all in turn; on the copy that has them all, the tests
that they bring pass, and emssd gives plain decoding's tokens.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scripts import vllm_release, vllm_tests
from scripts.vllm_release import REPOSITORY

PATCHES = REPOSITORY / "patches"
MADE_AGAINST = "0.33.0"
SMOKE = ("tests/regression/test_against_stock.py", "-k", "not padded and not cache")
HEADER = ("From: ", "Subject: [PATCH] ", "Signed-off-by: ")
OUR_WORDS = ("emssd", "Hook:", "Remove when:")


@dataclass(frozen=True)
class Patch:
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def message(self) -> str:
        return self.path.read_text().partition("\n---\n")[0]

    @property
    def tests(self) -> list[str]:
        """Test files that it adds or changes, relative to vLLM's repository."""
        return re.findall(r"^\+\+\+ b/(tests/.*)$", self.path.read_text(), re.MULTILINE)

    def problems(self) -> list[str]:
        """What vLLM's maintainers would send it back for at sight."""
        lines = self.message.splitlines()
        lacks = [w for w in HEADER if not any(x.startswith(w) for x in lines)]
        text = "\n".join(x for x in lines if not x.startswith(("From: ", "Signed-off")))
        return [
            *(f"{self.name} has no {start.strip()!r} line" for start in lacks),
            *(f"{self.name} says {word!r}" for word in OUR_WORDS if word in text),
            *([] if self.tests else [f"{self.name} brings no test"]),
        ]


def patches() -> list[Patch]:
    return [Patch(path) for path in sorted(PATCHES.glob("*.patch"))]


def apply(patch: Patch, root: Path, check_only: bool = False) -> list[str]:
    """Apply to the release in `root`. Returns why it does not apply."""
    command = ["git", "apply", *(["--check"] if check_only else []), str(patch.path)]
    # Outside any repository: inside one, git would skip files that it ignores.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env=environment
    )
    return [f"{patch.name}: {done.stderr.strip()}"] if done.returncode else []


def patched_copy(version: str, root: Path) -> list[str]:
    """The release with all patches, in `root`. Returns which do not apply."""
    _, source = vllm_release.source_of(version)
    _, kernels = vllm_release.installed_kernels()
    vllm_release.assemble(source, version, kernels, root)
    shutil.copytree(source / "tests", root / "tests")
    shutil.copy(source / "pyproject.toml", root)
    problems = [p for patch in patches() for p in apply(patch, root, check_only=True)]
    return problems or [p for patch in patches() for p in apply(patch, root)]


def smoke(root: Path, environment: Path) -> int:
    """Our own engines on the patched copy."""
    path = os.pathsep.join([str(root), str(environment), str(REPOSITORY)])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *SMOKE]
    variables = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=REPOSITORY, env=variables).returncode


def check(version: str) -> list[str]:
    """What is wrong with the patches on that release.

    Raises: RuntimeError where the release cannot be had.
    """
    problems = [problem for patch in patches() for problem in patch.problems()]
    version, kernels_version, environment = vllm_release.environment(version)
    print(vllm_release.describe(version, kernels_version), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "vllm-patched"
        problems += patched_copy(version, root)
        if problems:
            return problems
        print(f"{len(patches())} patches apply, each by itself and all", flush=True)
        tests = [test for patch in patches() for test in patch.tests]
        if vllm_tests.run(root, "-q", *tests, search=(root, environment)):
            problems.append("tests that the patches bring fail")
        if smoke(root, environment):
            problems.append("emssd's tokens differ on the patched copy")
    return problems


def main() -> int:
    version = sys.argv[1] if len(sys.argv) > 1 else MADE_AGAINST
    try:
        problems = check(version)
    except RuntimeError as error:
        problems = [f"vLLM {version}: {error}"]
    for problem in problems:
        print(f"FAIL {problem}")
    print("all fits" if not problems else f"{len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
