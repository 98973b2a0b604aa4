"""`vllm-emssd doctor`: can this machine serve with emssd, and what to change."""

from __future__ import annotations

import argparse

from vllm_emssd.integration.doctor import Finding, State, findings, plugin_is_on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Looks at versions, devices, preloads, threads, the compiler, vLLM's kernels, "
        "the plugin in this process and in a new one, and the hooks. Ends with 0 where "
        "emssd can serve, else with 1."
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


def describe(finding: Finding) -> str:
    line = f"{finding.state:5}  {finding.about}: {finding.found}"
    if finding.fix:
        line += f"\n       change: {finding.fix}"
    return line


def _print_hooks() -> int:
    from vllm_emssd.integration import hook_inventory
    from vllm_emssd.integration.hooks.hook import difference

    plugin_is_on()  # as vLLM loads it: what is always in place is in place now
    print("\n".join(map(hook_inventory.describe, hook_inventory.INVENTORY)))
    return int(any(map(difference, hook_inventory.INVENTORY)))
