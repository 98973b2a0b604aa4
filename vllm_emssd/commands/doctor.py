"""`vllm-emssd doctor`: can this machine serve with emssd, and what to change."""

from __future__ import annotations

import argparse
import textwrap

from vllm_emssd.integration.checkup import Finding, State, findings, plugin_is_on
from vllm_emssd.integration.hooks import Hook, is_installed
from vllm_emssd.integration.inventory import INVENTORY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Looks at versions, devices, preloads, thread binding, the plugin in this "
        "process and in a new one, and the hooks. Ends with 0 where emssd can serve, "
        "else with 1."
    )
    parser.add_argument(
        "--hooks", action="store_true", help="list the names of vLLM's it replaces"
    )
    parser.add_argument(
        "--strict", action="store_true", help="end with 1 for what is slow, too"
    )


def run(args: argparse.Namespace) -> int:
    if args.hooks:
        plugin_is_on()  # as vLLM loads it: what is always in place is in place now
        print("\n\n".join(map(describe_hook, INVENTORY)))
        return 0
    states = []
    for finding in findings():
        print(describe(finding), flush=True)
        states.append(finding.state)
    is_bad = State.WRONG in states or (args.strict and State.SLOW in states)
    return int(is_bad)


def describe(finding: Finding) -> str:
    line = f"{finding.state:5}  {finding.about}: {finding.found}"
    if finding.fix:
        line += f"\n       change: {finding.fix}"
    return line


def describe_hook(hook: Hook) -> str:
    state = "in place now" if is_installed(hook) else "not in place now"
    rows = {
        "why": hook.why,
        "signature": f"({hook.signature})",
        "remove when": hook.remove_when,
    }
    lines = [f"{hook.target}: {state}"]
    lines += [
        textwrap.fill(f"{name}: {text}", 88, initial_indent="  ", subsequent_indent=" ")
        for name, text in rows.items()
    ]
    return "\n".join(lines)
