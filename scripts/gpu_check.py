#!/usr/bin/env python3
"""Run what needs a GPU, tests and a table, and write down what came of it.

    scripts/gpu_check [--output docs/results/gpu-check.json] [-- PYTEST ARGS]

Every test is listed with its outcome, beside the command, commit, versions and machine.
Then the methods run side by side (`vllm-emssd bench`), on the shipped target grown to
1.1B and to 7B parameters so that it costs what real ones do: gpu-bench-1B.json and
gpu-bench-7B.json beside it. Exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vllm_emssd.bench.provenance import provenance
from vllm_emssd.bench.report import write_result

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "docs/results"
GROWN = {
    "1B": ["--hidden-size", "2048", "--num-layers", "24"],
    "7B": ["--hidden-size", "4096", "--num-layers", "40"],
}
BATCHES = {"1B": ["1", "8", "32", "128"], "7B": ["1", "8", "32", "64"]}
DRAFT = str(REPO / "models/draft")


def with_ragged_graphs(**options: str | int) -> str:
    """As `bench --methods` takes it."""
    config = {"method": "emssd", "model": DRAFT, "ragged_graphs": True}
    return json.dumps(config | options)


BENCH = [
    *["--draft-model", DRAFT, "--input-len", "256", "--output-len", "128"],
    *["--num-prompts", "2", "--num-iters", "4"],
    *["--start-together", "--kv-cache-memory-bytes", "4608M"],
    *["--methods", "plain", "stock", "emssd", "auto"],
    "emssd-ragged="
    + with_ragged_graphs(draft_length="fixed", num_speculative_tokens=5),
    "auto-ragged=" + with_ragged_graphs(draft_length="auto", num_speculative_tokens=8),
]


def run_tests(num_workers: int, arguments: list[str]) -> list[dict[str, Any]]:
    """Outcome of each test, in order."""
    workers = ["-n", str(num_workers)] if num_workers > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", *workers]
        subprocess.run(
            [*pytest, "-v", f"--junitxml={report}", *arguments], cwd=REPO, check=False
        )
        if not report.exists():
            raise SystemExit("pytest wrote no report; see its output above")
        return [outcome(case) for case in ElementTree.parse(report).iter("testcase")]


def outcome(case: ElementTree.Element) -> dict[str, Any]:
    result: dict[str, Any] = {"name": case.get("name"), "outcome": "passed"}
    for tag, name in (
        ("failure", "failed"),
        ("error", "failed"),
        ("skipped", "skipped"),
    ):
        found = case.find(tag)
        if found is not None:
            result |= {"outcome": name, "why": (found.get("message") or "")[:2000]}
    return result | {"seconds": float(case.get("time") or 0)}


def run_bench(size: str, folder: Path) -> bool:
    """Whether its table and its figure were written to the folder."""
    output = folder / f"gpu-bench-{size}.json"
    with tempfile.TemporaryDirectory(dir=large_files()) as models:
        target = Path(models) / "target"
        grow = [sys.executable, "-m", "models.make.grow_model"]
        options = [REPO / "models/target", target, *GROWN[size], "--device", "cuda"]
        subprocess.run([*grow, *options], cwd=REPO, check=True)
        cli = [sys.executable, "-m", "vllm_emssd"]
        bench = [*cli, "bench", "throughput", "--model", target, *BENCH]
        bench += ["--max-concurrency", *BATCHES[size]]
        plot = [*cli, "plot", output, "-o", folder]
        return all(
            subprocess.run(command, cwd=REPO, check=False).returncode == 0
            for command in ([*bench, "--output-json", output], plot)
        )


def large_files() -> str | None:
    """A folder in memory where there is one: a disk takes longer than all rounds."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu-check.json")
    parser.add_argument(
        "--workers", type=int, default=1, help="tests at once, each with an engine"
    )
    parser.add_argument("--sizes", nargs="+", choices=GROWN, default=list(GROWN))
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-bench", action="store_true")
    parser.add_argument("pytest_arguments", nargs="*")
    return parser.parse_args()


def write_tests(output: Path, started: str, tests: list[dict[str, Any]]) -> int:
    """Returns how many failed."""
    result = {"provenance": provenance(), "started": started, "tests": tests}
    write_result(output, result)
    num_failed = sum(test["outcome"] == "failed" for test in tests)
    print(f"{len(tests)} tests, {num_failed} failed; wrote {output}")
    return num_failed if tests else 1


def main() -> int:
    arguments = parse_arguments()
    num_failed = 0
    if not arguments.no_tests:
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        tests = run_tests(arguments.workers, arguments.pytest_arguments)
        num_failed += write_tests(arguments.output, started, tests)
    if not arguments.no_bench:
        for size in arguments.sizes:
            num_failed += not run_bench(size, arguments.output.parent)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
