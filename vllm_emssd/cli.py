"""`vllm-emssd COMMAND`: each command is a module with `add_arguments` and `run`.

A command's module is imported only when it is asked for, so that the simulator needs
no vLLM and the server no plotting library.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from vllm_emssd import __version__

COMMANDS = {  # modules of vllm_emssd.commands
    "bench": "time methods side by side",
    "simulate": "predict speeds from a recorded trace and a cost table",
    "doctor": "can this machine serve with emssd?",
    "serve": "vllm serve, set up for this machine",
    "plot": "draw the figure of a result",
}


def main(argv: Sequence[str] | None = None) -> int:
    listing = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    top = argparse.ArgumentParser(
        prog="vllm-emssd",
        description="Unpadded, per-request speculative decoding for vLLM.",
        epilog=f"commands:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=__version__)
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    top.add_argument("args", nargs=argparse.REMAINDER, metavar="...")
    chosen = top.parse_args(argv)
    command = import_module(f"vllm_emssd.commands.{chosen.command}")
    parser = argparse.ArgumentParser(
        prog=f"vllm-emssd {chosen.command}", description=COMMANDS[chosen.command]
    )
    command.add_arguments(parser)
    code: int = command.run(parser.parse_args(chosen.args))
    return code
