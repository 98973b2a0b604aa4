"""Holds the plugin and its patches against a vLLM.

    scripts/check_patches              the installed vLLM: patches apply to a copy, the
                                       copy imports, and emssd runs on it without hooks
    scripts/check_patches 0.33.0       that release, fetched from the package index and
                                       read, not installed; "latest": the newest

Either way: every name, hook, overridden method, attribute and call of vLLM's that the
plugin uses is there and fits.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from scripts import vllm_source
from scripts.plugin_uses import REPOSITORY, PluginUses
from scripts.vllm_source import PACKAGE

PATCHES = REPOSITORY / "patches"
SMOKE = REPOSITORY / "scripts" / "smoke_patched.py"
SMOKE_V2 = REPOSITORY / "scripts" / "smoke_patched_v2.py"
HEADER = ("Subject: ", "Why: ", "Upstream issue: ", "Remove when: ")


@dataclass(frozen=True)
class Patch:
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def header(self) -> str:
        return self.path.read_text().partition("\n---\n")[0]

    @property
    def files(self) -> list[str]:
        """Paths it changes or adds, relative to the folder of `vllm/`."""
        lines = self.path.read_text().splitlines()
        return [line[6:] for line in lines if line.startswith("+++ b/")]


def patches_for(version: str) -> list[Patch]:
    """Those of the version's series, or of the newest series before it."""
    series = {Version(p.name.removeprefix("vllm-")): p for p in PATCHES.glob("vllm-*")}
    minor = Version(".".join(version.split(".")[:2]))
    fitting = max((v for v in series if v <= minor), default=min(series))
    return [Patch(path) for path in sorted(series[fitting].glob("*.patch"))]


def touched_files(patches: list[Patch]) -> set[str]:
    return {name for patch in patches for name in patch.files}


class Report:
    """Prints each check as it is made."""

    def __init__(self) -> None:
        self.num_failed = 0

    def add(self, what: str, problems: list[str]) -> None:
        print(f"{'FAIL' if problems else 'ok':4} {what}", flush=True)
        for problem in problems:
            print(f"     {problem}")
        self.num_failed += bool(problems)


def check_headers(patches: list[Patch]) -> list[str]:
    return [
        f"{patch.path.name} lacks {field.strip()!r}"
        for patch in patches
        for field in HEADER
        if f"\n{field}" not in f"\n{patch.header}"
    ]


def apply(patch: Patch, root: Path, check_only: bool = False) -> list[str]:
    """Apply to `root`/vllm. Returns why it does not apply."""
    command = ["git", "apply", *(["--check"] if check_only else []), str(patch.path)]
    # Outside any repository: inside one, git would skip files that it ignores.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env=environment
    )
    return [f"{patch.name}: {done.stderr.strip()}"] if done.returncode else []


def copy_touched(source: Path, patches: list[Patch], root: Path) -> None:
    """The files that patches change, as real files under `root`."""
    for name in touched_files(patches):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copy(source / name, path)


def link_package(source: Path, root: Path) -> None:
    """The whole installed package under `root`, as links: nothing is copied."""
    shutil.copytree(
        source / PACKAGE, root / PACKAGE, copy_function=os.symlink, symlinks=True
    )


def check_patches(source: Path, patches: list[Patch], root: Path) -> list[str]:
    """Each applies by itself, and all in turn; what comes out parses."""
    copy_touched(source, patches, root)
    problems = [p for patch in patches for p in apply(patch, root, check_only=True)]
    if problems:
        return problems
    problems = [p for patch in patches for p in apply(patch, root)]
    for name in touched_files(patches):
        try:
            ast.parse((root / name).read_text())
        except SyntaxError as error:
            problems.append(f"{name}: {error}")
    return problems


def check_uses(report: Report, source: Path, patched: Path) -> None:
    uses, with_patches = PluginUses(source), PluginUses(patched, source)
    count = f"{len(list(uses.imports()))} imports, {len(uses.hooks())} hooks, "
    count += f"{len(uses.overrides())} overrides, {uses.num_judged()} expressions"
    report.add(f"what the plugin uses fits ({count})", list(map(str, uses.problems())))
    report.add(
        "what the plugin uses fits the patched copy",
        list(map(str, with_patches.problems())),
    )


def check_overrides(installed: Path, *sources: Path) -> list[str]:
    """What overrides a method of the installed vLLM must do so in the other as well: a
    method that vLLM renamed would never be called."""
    lost = PluginUses(installed).overrides() - PluginUses(*sources).overrides()
    return [
        f"{cls}.{method} overrides nothing any more" for cls, method in sorted(lost)
    ]


def installed_root() -> Path | None:
    spec = find_spec(PACKAGE)
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def check_imports(patches: list[Patch], root: Path) -> list[str]:
    """Import what the patches touch, from the copy."""
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in touched_files(patches)
    )
    code = (
        "import importlib, vllm\n"
        f"assert vllm.__file__.startswith({str(root)!r}), vllm.__file__\n"
        "from vllm.platforms import current_platform\n"
        "if current_platform.is_cpu(): import vllm.v1.worker.cpu.shm\n"
        f"for name in {modules!r}: importlib.import_module(name)"
    )
    return run_on_copy([sys.executable, "-c", code], root)


def run_on_copy(command: list[str], root: Path) -> list[str]:
    """Run with the copy as vLLM and this repository as the plugin. Prints its output;
    returns the end of it where it failed."""
    search = [str(root), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        return [*done.stdout.splitlines()[-20:], *done.stderr.splitlines()[-20:]]
    for line in done.stdout.splitlines():
        print(f"     {line}")
    return []


def check_installed(report: Report, with_smoke: bool) -> None:
    source = installed_root()
    if source is None:
        raise RuntimeError("no vLLM is installed; name a release, e.g. latest")
    version = installed_version(PACKAGE)
    patches = patches_for(version)
    print(f"vLLM {version} (installed), patches of {patches[0].path.parent.name}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        link_package(source, root)
        check_source(report, source, patches, root)
        report.add("the patched copy imports", check_imports(patches, root))
        if with_smoke:
            smoke = run_on_copy([sys.executable, str(SMOKE)], root)
            report.add("emssd runs on the patched copy without hooks", smoke)
        if with_smoke and find_spec("triton"):
            smoke = run_on_copy([sys.executable, str(SMOKE_V2)], root)
            report.add("so it does on the V2 runner", smoke)


def check_release(report: Report, version: str) -> None:
    version, source = vllm_source.fetch(version)
    patches = patches_for(version)
    print(f"vLLM {version} (read), patches of {patches[0].path.parent.name}")
    with tempfile.TemporaryDirectory() as folder:
        check_source(report, source, patches, Path(folder))
        installed = installed_root()
        if installed is not None:
            report.add(
                "methods that override the installed vLLM's do so here",
                check_overrides(installed, source),
            )


def check_source(
    report: Report, source: Path, patches: list[Patch], root: Path
) -> None:
    report.add(f"{len(patches)} patches say why and until when", check_headers(patches))
    report.add(
        "patches apply, each by itself and all", check_patches(source, patches, root)
    )
    check_uses(report, source, root)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", nargs="?", help="a release, or latest")
    parser.add_argument(
        "--no-smoke", action="store_true", help="start no engine on the patched copy"
    )
    args = parser.parse_args()
    report = Report()
    try:
        if args.version is None:
            check_installed(report, with_smoke=not args.no_smoke)
        else:
            check_release(report, args.version)
    except RuntimeError as error:
        report.add("vLLM is at hand", [str(error)])
    print("all fits" if not report.num_failed else f"{report.num_failed} checks failed")
    return int(report.num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
