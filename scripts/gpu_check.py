#!/usr/bin/env python3
"""Run the GPU tests and write one result file.

    scripts/gpu_check [--output docs/results/gpu-check.json] [-- PYTEST ARGS]

Every test is listed with its outcome and what it recorded (tokens a second), besides
the command, commit, versions and machine. Exits with 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

REPO = Path(__file__).resolve().parent.parent


def output_of(*command: str) -> str:
    return subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, check=False
    ).stdout.strip()


def machine() -> dict[str, Any]:
    return {
        "gpus": output_of(
            "nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv"
        ).splitlines()[1:],
        "cpu": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("vllm", "torch", "vllm-emssd")},
    }


def run_tests(arguments: list[str]) -> list[dict[str, Any]]:
    """Outcome of each test, in order."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu"]
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
    result["seconds"] = float(case.get("time") or 0)
    recorded = {
        str(p.get("name")): float(p.get("value") or 0) for p in case.iter("property")
    }
    return result | ({"tokens_per_second": recorded} if recorded else {})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=REPO / "docs/results/gpu-check.json"
    )
    parser.add_argument("pytest_arguments", nargs="*")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    tests = run_tests(arguments.pytest_arguments)
    result = {
        "command": " ".join(["scripts/gpu_check", *sys.argv[1:]]),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "started": started,
        "machine": machine(),
        "tests": tests,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    num_failed = sum(test["outcome"] == "failed" for test in tests)
    print(f"{len(tests)} tests, {num_failed} failed; wrote {arguments.output}")
    return 1 if num_failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
