"""`vllm-emssd doctor`: can this machine serve with emssd, and what to change."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from vllm_emssd import __version__
from vllm_emssd.integration.doctor.finding import Finding, State, did_not_work

NEEDED = {
    "torch": "it comes with vLLM",
    "vllm": "pip install 'vllm-emssd[vllm]' on an NVIDIA GPU, else 'vllm-emssd[cpu]'",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Looks at versions, devices, preloads, thread binding, the plugin in this "
        "process and in a new one, and the hooks. Ends with 0 where emssd can serve, "
        "else with 1."
    )
    parser.add_argument(
        "--hooks",
        action="store_true",
        help="list the names of vLLM's it replaces, and their state",
    )
    parser.add_argument(
        "--strict", action="store_true", help="end with 1 for what is slow, too"
    )


def run(args: argparse.Namespace) -> int:
    if args.hooks:
        return _print_hooks()
    states = []
    for finding in findings():
        print(describe(finding), flush=True)
        states.append(finding.state)
    is_bad = State.WRONG in states or (args.strict and State.SLOW in states)
    return int(is_bad)


def findings() -> Iterator[Finding]:
    """All checks. What the others import is imported first, and ends them if it fails:
    the command is for installations that are broken, too."""
    yield Finding("vllm-emssd", State.OK, __version__)
    yield Finding("python", State.OK, platform.python_version())
    for name, how in NEEDED.items():
        try:
            version = import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                yield did_not_work(name, error)
            else:
                yield Finding(name, State.WRONG, "is not installed", how)
            return
        except Exception as error:  # of what a broken one may raise, anything
            yield did_not_work(name, error)
            return
        if name == "torch":
            yield Finding(name, State.OK, version)
    try:
        checkup: Any = import_module("vllm_emssd.integration.doctor.checks")
    except Exception as error:
        yield did_not_work("vllm", error)
        return
    yield from checkup.findings()


def describe(finding: Finding) -> str:
    line = f"{finding.state:5}  {finding.about}: {finding.found}"
    if finding.fix:
        line += f"\n       change: {finding.fix}"
    return line


def _print_hooks() -> int:
    from vllm_emssd.integration.doctor.checks import plugin_is_on
    from vllm_emssd.integration.hooks.inventory import describe, hook_rows

    plugin_is_on()  # as vLLM loads it: what is always in place is in place now
    rows = hook_rows()
    print("\n".join(map(describe, rows)))
    return 0 if all(row.is_ok for row in rows) else 1
