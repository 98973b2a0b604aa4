#!/usr/bin/env python3
"""Run what needs a GPU, part by part, and write down what came of it.

    scripts/gpu_check [--folder docs/results] [--parts tests 1B] [-- PYTEST ARGS]

The parts are *tests*, every one listed with its outcome, *probes* (what one launch,
replay, wait and copy cost the host), *1B* and *7B* (`vllm-emssd bench`, the methods
side by side on the shipped target grown to so many parameters, so that it costs what
real ones do). Each writes its file at once: gpu-check.json, gpu-probes.json,
gpu-bench-1B.json, gpu-bench-7B.json. A part whose file is of this commit, without a
failure, is left out, so that a run that was cut off goes on where it was. Exits with 1
if anything failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from vllm_emssd.bench.provenance import provenance
from vllm_emssd.bench.report import write_result

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "docs/results"
GROWN = {
    "1B": ["--hidden-size", "2048", "--num-layers", "24"],
    "7B": ["--hidden-size", "4096", "--num-layers", "40"],
}
BATCHES = {"1B": ["1", "8", "32", "128"], "7B": ["1", "8", "32", "64"]}
FILES = {  # in the order of the runs: first whether it is right
    "tests": "gpu-check.json",
    "probes": "gpu-probes.json",
    "1B": "gpu-bench-1B.json",
    "7B": "gpu-bench-7B.json",
}
STOCK = {"method": "draft_model", "model": str(REPO / "models/draft")}
# What a user of vLLM alone can switch on, beside its draft_model with K = 5.
STOCK_METHODS = {
    "stock-adaptive": {
        "num_speculative_tokens": 5,
        "enable_adaptive_verification": True,
    },
    "stock-by-batch": {
        "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": [
            [1, 16, 5],
            [17, 64, 3],
            [65, 512, 1],
        ],
    },
}
BENCH = [
    *["--draft-model", STOCK["model"], "--input-len", "257", "--output-len", "128"],
    *["--num-prompts", "2", "--num-iters", "4"],
    *["--start-together", "--kv-cache-memory-bytes", "4608M"],
    *["--methods", "plain", "stock", "stock-k3", "emssd", "auto"],
    *(f"{name}={json.dumps(STOCK | more)}" for name, more in STOCK_METHODS.items()),
]
PROBED = 200  # calls


def run_probes(output: Path) -> bool:
    """Microseconds of the host for a call, in the median."""
    tensor, host = torch.zeros(1024, device="cuda"), torch.zeros(1024).pin_memory()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            tensor.add_(1)
    event = torch.cuda.Event()

    def wait() -> None:
        event.record()
        event.synchronize()

    probes: dict[str, Callable[[], object]] = {
        "kernel launch": lambda: tensor.add_(1),
        "replay of 20 kernels": graph.replay,
        "event and wait": wait,
        "copy to the host, not waited for": lambda: host.copy_(tensor, True),
        "copy to the host": lambda: host.copy_(tensor),
    }
    seen = {name: median_us(probe) for name, probe in probes.items()}
    write_result(output, {"provenance": provenance(), "host_us": seen})
    print(seen)
    return True


def median_us(probe: Callable[[], object]) -> float:
    times = []
    for _ in range(PROBED):
        torch.cuda.synchronize()
        started = time.perf_counter()
        probe()
        times.append((time.perf_counter() - started) * 1e6)
    return round(sorted(times)[PROBED // 2], 1)


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


def run_bench(size: str, output: Path) -> bool:
    """Whether its table, and a figure beside it, were written."""
    with tempfile.TemporaryDirectory(dir=large_files()) as models:
        target = Path(models) / "target"
        grow = [sys.executable, "-m", "models.make.grow_model"]
        options = [REPO / "models/target", target, *GROWN[size], "--device", "cuda"]
        subprocess.run([*grow, *options], cwd=REPO, check=True)
        cli = [sys.executable, "-m", "vllm_emssd"]
        bench = [*cli, "bench", "throughput", "--model", target, *BENCH]
        bench += ["--max-concurrency", *BATCHES[size]]
        plot = [*cli, "plot", output, "-o", output.parent]
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
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the results")
    parser.add_argument("--parts", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument(
        "--again", action="store_true", help="also the parts with such a file"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="tests at once, each with an engine"
    )
    parser.add_argument("pytest_arguments", nargs="*")
    return parser.parse_args()


def check(output: Path, num_workers: int, pytest_arguments: list[str]) -> bool:
    """Whether all tests passed."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    tests = run_tests(num_workers, pytest_arguments)
    result = {"provenance": provenance(), "started": started, "tests": tests}
    write_result(output, result)
    num_failed = sum(test["outcome"] == "failed" for test in tests)
    print(f"{len(tests)} tests, {num_failed} failed; wrote {output}")
    return bool(tests) and not num_failed


def is_done(output: Path) -> bool:
    """Results of a run make the checkout of the next one differ; that is no change."""
    if not output.exists():
        return False
    result = json.loads(output.read_text())
    has_failed = any(t["outcome"] == "failed" for t in result.get("tests", []))
    seen, now = result["provenance"]["commit"], provenance()["commit"]
    is_same = seen.removesuffix("-dirty") == now.removesuffix("-dirty")
    return bool(now) and is_same and not has_failed


def main() -> int:
    arguments = parse_arguments()
    all_well = True
    for part in arguments.parts:
        output = arguments.folder / FILES[part]
        if is_done(output) and not arguments.again:
            print(f"{part}: {output} is of this commit; --again runs it again")
        elif part == "probes":
            all_well &= run_probes(output)
        elif part == "tests":
            all_well &= check(output, arguments.workers, arguments.pytest_arguments)
        else:
            all_well &= run_bench(part, output)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
