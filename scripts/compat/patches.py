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
from pathlib import Path

from scripts.compat import vllm_tests
from scripts.compat.release import (
    REPOSITORY,
    Release,
    asked_for,
    assemble,
    installed_kernels,
)

PATCHES = sorted((REPOSITORY / "patches").glob("*.patch"))
MADE_AGAINST = "0.33.0"
SMOKE = ("tests/regression/test_against_stock.py", "-k", "not padd and not cache")


def changed_tests(patch: Path) -> list[str]:
    """Test files that it adds or changes, relative to vLLM's repository."""
    return re.findall(r"^\+\+\+ b/(tests/.*)$", patch.read_text(), re.MULTILINE)


def apply(patch: Path, root: Path, *options: str) -> list[str]:
    """Apply to the release in `root`. Returns why it does not apply."""
    command = ["git", "apply", *options, str(patch)]
    # Outside any repository: inside one, git would skip files that it ignores.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env=environment
    )
    return [f"{patch.name}: {done.stderr.strip()}"] if done.returncode else []


def patched_copy(release: Release, root: Path) -> list[str]:
    """The release with all patches, in `root`. Returns which do not apply."""
    assemble(release.source, release.version, installed_kernels()[1], root)
    shutil.copytree(release.source / "tests", root / "tests")
    shutil.copy(release.source / "pyproject.toml", root)
    problems = [p for patch in PATCHES for p in apply(patch, root, "--check")]
    return problems or [p for patch in PATCHES for p in apply(patch, root)]


def check(release: Release) -> list[str]:
    """What is wrong with the patches on that release."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "vllm-patched"
        root.mkdir()
        if problems := patched_copy(release, root):
            return problems
        print(f"{len(PATCHES)} patches apply, each by itself and all", flush=True)
        tests = [test for patch in PATCHES for test in changed_tests(patch)]
        search = (root, release.folder)
        if vllm_tests.run(root, "-q", *tests, search=search):
            problems.append("tests that the patches bring fail")
        path = os.pathsep.join(map(str, [*search, REPOSITORY]))
        smoke = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *SMOKE]
        variables = os.environ | {"PYTHONPATH": path}
        if subprocess.run(smoke, cwd=REPOSITORY, env=variables).returncode:
            problems.append("emssd's tokens differ on the patched copy")
    return problems


def main() -> int:
    release = asked_for(sys.argv[1] if len(sys.argv) > 1 else MADE_AGAINST)
    print(release, flush=True)
    problems = check(release)
    for problem in problems:
        print(f"FAIL {problem}")
    print("all fits" if not problems else f"{len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
