"""`vllm-emssd plot`: the figure of each result of `vllm-emssd bench`."""

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


def run(args: argparse.Namespace) -> int:
    try:
        from vllm_emssd.bench.plots import draw_result
    except ImportError:
        print(
            "vllm-emssd plot needs matplotlib: pip install matplotlib", file=sys.stderr
        )
        return 1
    for path in args.results:
        figure = args.output_dir / f"{path.stem}-speed-up.png"
        try:
            draw_result(json.loads(path.read_text()), figure)
        except (OSError, ValueError) as error:
            print(f"vllm-emssd plot: {path}: {error}", file=sys.stderr)
            return 1
        except KeyError as error:
            print(
                f"vllm-emssd plot: {path} is no result of vllm-emssd bench: "
                f"it has no {error}",
                file=sys.stderr,
            )
            return 1
        print(figure)
    return 0
