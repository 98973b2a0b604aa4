"""`vllm-emssd COMMAND`: each command is a module with `add_arguments` and `run`.

A command's module is imported only when it is asked for, so that the simulator needs
no vLLM and the server no plotting library.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from vllm_emssd import __version__


class Command(Protocol):
    """What a command's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int:
        """Returns the exit code."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    module: str
    help: str


COMMANDS: dict[str, Entry] = {
    "bench": Entry("vllm_emssd.commands.bench", "time methods side by side"),
    "simulate": Entry(
        "vllm_emssd.commands.simulate",
        "predict speeds from a recorded trace and a cost table",
    ),
    "doctor": Entry("vllm_emssd.commands.doctor", "can this machine serve with emssd?"),
    "serve": Entry("vllm_emssd.commands.serve", "vllm serve, set up for this machine"),
    "plot": Entry("vllm_emssd.commands.plot", "draw the figure of a result"),
}


def _top_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:10} {e.help}" for name, e in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="vllm-emssd",
        description="Unpadded, per-request speculative decoding for vLLM.",
        epilog=f"commands:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    chosen = _top_parser().parse_args(argv)
    entry = COMMANDS[chosen.command]
    command = cast(Command, import_module(entry.module))
    parser = argparse.ArgumentParser(
        prog=f"vllm-emssd {chosen.command}", description=entry.help
    )
    command.add_arguments(parser)
    return command.run(parser.parse_args(chosen.args))


if __name__ == "__main__":
    sys.exit(main())
