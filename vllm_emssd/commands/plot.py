"""`vllm-emssd plot`: figures of results of `vllm-emssd bench`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument(
        "-o", "--output-dir", type=Path, default=Path(), help="for RESULT-speed-up.png"
    )
    parser.add_argument(
        "--side-by-side", metavar="NAME", help="one figure of all, NAME-speed-up.png"
    )


def run(args: argparse.Namespace) -> int:
    try:
        from vllm_emssd.bench.plots import draw_results
    except ImportError:
        print(
            "vllm-emssd plot needs matplotlib: pip install matplotlib", file=sys.stderr
        )
        return 1
    figures = {path.stem: [path] for path in args.results}
    if args.side_by_side:
        figures = {args.side_by_side: args.results}
    for name, paths in figures.items():
        figure = args.output_dir / f"{name}-speed-up.png"
        said = ", ".join(map(str, paths))
        try:
            draw_results([json.loads(path.read_text()) for path in paths], figure)
        except (OSError, ValueError) as error:
            print(f"vllm-emssd plot: {said}: {error}", file=sys.stderr)
            return 1
        except KeyError as error:
            print(
                f"vllm-emssd plot: no result of vllm-emssd bench: {said}: "
                f"it has no {error}",
                file=sys.stderr,
            )
            return 1
        print(figure)
    return 0
