"""`vllm-emssd doctor`: what of this installation works."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hooks",
        action="store_true",
        required=True,
        help="list every name of vLLM's that the plugin replaces, and its state",
    )


def run(args: argparse.Namespace) -> int:
    from vllm.plugins import load_general_plugins

    from vllm_emssd.integration.inventory import describe, hook_rows

    load_general_plugins()  # as every process of vLLM does
    rows = hook_rows()
    print("\n".join(map(describe, rows)))
    return 0 if all(row.is_ok for row in rows) else 1
