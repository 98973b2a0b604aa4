"""`vllm-emssd serve`: `vllm serve` with the preloads and threads that a CPU wants."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from vllm_emssd.integration.cpu.settings import has_nvidia_gpu, settings_here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Starts `vllm serve` with all that follows. On a machine without an NVIDIA "
        "GPU it first preloads Intel OpenMP and tcmalloc where they are installed, and "
        "on few CPUs lets vLLM use all of them. What is set already stays."
    )
    parser.usage = "%(prog)s [--dry-run] MODEL [options of vllm serve]"
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be run, and end"
    )
    parser.add_argument(
        "model", metavar="MODEL", help="the target model; options come after it"
    )
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="of vllm serve"
    )


def run(args: argparse.Namespace) -> int:
    """Does not return but for --dry-run: this process becomes vLLM."""
    added = {} if has_nvidia_gpu() else settings_here(os.environ)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    command += [args.model, *args.options]
    settings = [f"{name}={shlex.quote(value)}" for name, value in added.items()]
    line = " ".join([*settings, shlex.join(command)])
    if args.dry_run:
        print(line)
        return 0
    print(f"[vllm-emssd] {line}", file=sys.stderr, flush=True)
    os.execve(sys.executable, command, os.environ | added)
