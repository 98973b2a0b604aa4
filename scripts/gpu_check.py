#!/usr/bin/env python3
"""Run what needs a GPU, first whether it is right, and write down what came of it.

    scripts/gpu_check [--folder docs/results] [--parts tests 1B] [-- PYTEST ARGS]

The parts, with minutes on an H200 by estimate, not measured:

    first   3  the tests that graphs give eager tokens and that nothing is waited for
    probes  1  what a launch, replay, wait and copy cost the host
    8B-1B   4  table: Llama's shapes, weights and acceptance made up
    7B-1B   4  table: the shipped pair, grown to so many parameters
    tests  15  all tests
    1B, 7B 10  tables: the shipped target grown to so many parameters, its drafter as is

Without --parts the first four run. Tables are of `vllm-emssd bench throughput`. Each
test and each number of requests is written at once, to gpu-check.json, gpu-probes.json
and gpu-bench-PART.json. What is there of this commit (EMSSD_COMMIT, where there is no
git) does not run again, but for what failed. Exits with 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from vllm_emssd.bench.provenance import provenance
from vllm_emssd.bench.report import write_result

REPO = Path(__file__).resolve().parent.parent
# In memory where there is one: a disk takes longer than all rounds.
MODELS = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / "vllm-emssd"
PROBED = 200  # calls
ACCEPTED = 0.75  # of made-up drafts, each after those before it
GROWN = {  # model, hidden size, layers
    "1B": ("target", "2048", "24"),
    "7B": ("target", "4096", "40"),
    "draft-1B": ("draft", "2048", "16"),
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
LLAMA |= {"vocab_size": 128256, "max_position_embeddings": 8192, "dtype": "bfloat16"}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {  # hidden size, layers, intermediate size
    "llama-8B": (4096, 32, 14336),
    "llama-1B": (2048, 16, 8192),
}
BENCH = [
    *[sys.executable, "-m", "vllm_emssd", "bench", "throughput", "--start-together"],
    *["--output-len", "128", "--num-prompts", "2", "--num-iters", "3"],
    *["--attention-backend", "FLASH_ATTN"],
]


def made_up(name: str, method: str, num_drafts: int, **more: Any) -> str:
    """Acceptance does not depend on the drafts."""
    drafts = {"model": str(MODELS / "llama-1B"), "num_speculative_tokens": num_drafts}
    rates = [ACCEPTED ** (i + 1) for i in range(num_drafts)]
    accepts = {"rejection_sample_method": "synthetic"}
    accepts |= {"synthetic_acceptance_rates": rates}
    return f"{name}={json.dumps({'method': method} | drafts | accepts | more)}"


class Table(NamedTuple):
    """All its engines are on the GPU together, so the K/V caches have to fit."""

    target: str
    draft: str
    methods: list[str]
    batches: list[int]  # the most telling first
    kv_cache_memory_bytes: str
    input_len: int


MADE_UP = [
    "plain",
    made_up("stock-k3", "draft_model", 3),
    made_up("stock", "draft_model", 5),
    made_up("emssd", "emssd", 5, draft_length="fixed"),
    made_up("auto", "emssd", 8, draft_length="auto"),
]
STOCK = "stock-k1 stock-k3 stock stock-k8 stock-adaptive stock-by-batch"
ALL = f"plain {STOCK} emssd auto auto-adaptive"
MANY = "plain stock-k3 stock stock-adaptive emssd auto"
FEW = "plain stock-k3 stock-adaptive emssd auto"  # there is no memory for one more
TABLES = {
    "8B-1B": Table("llama-8B", "llama-1B", MADE_UP, [32, 1, 128, 8], "5632M", 129),
    "1B": Table("1B", "draft", ALL.split(), [32, 1, 128, 256, 8, 64], "5632M", 257),
    "7B-1B": Table("7B", "draft-1B", FEW.split(), [32, 128, 1, 64], "6656M", 129),
    "7B": Table("7B", "draft", MANY.split(), [32, 1, 64, 8], "4608M", 257),
}
FEWER = ("plain", "stock-k3", "emssd")  # where an engine of the others does not start
PARTS = ("first", "probes", "8B-1B", "7B-1B", "tests", "1B", "7B")
FIRST = "eager_compiled_and_graphs or waits_for_nothing"  # tests of the part "first"


def model(name: str) -> str:
    """Its folder, made where it is not there."""
    folder = MODELS / name
    if name in SHAPES:
        sizes = ("hidden_size", "num_hidden_layers", "intermediate_size")
        config = LLAMA | dict(zip(sizes, SHAPES[name], strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        for file in (REPO / "models/target").glob("tokenizer*"):
            shutil.copy(file, folder)
    elif name not in GROWN:
        return str(REPO / "models" / name)
    elif not (folder / "tokenizer.json").exists():  # which is written last
        small, width, depth = GROWN[name]
        grow = [sys.executable, "-m", "models.make.grow_model", f"models/{small}"]
        grow += [str(folder), "--hidden-size", width, "--num-layers", depth]
        subprocess.run([*grow, "--device", "cuda"], cwd=REPO, check=True)
    return str(folder)


def run_table(name: str, output: Path) -> bool:
    table = TABLES[name]
    command = [*BENCH, "--model", model(table.target), "--draft-model"]
    command += [model(table.draft), "--input-len", str(table.input_len)]
    command += ["--kv-cache-memory-bytes", table.kv_cache_memory_bytes]
    command += ["--load-format", "dummy"] if table.target in SHAPES else []
    command += ["--max-concurrency", *map(str, table.batches)]
    command += ["--output-json", str(output), "--methods"]

    def bench(methods: list[str]) -> bool:
        return not subprocess.run(
            [*command, *methods], cwd=REPO, check=False
        ).returncode

    fewer = [text for text in table.methods if text.partition("=")[0] in FEWER]
    if of_this_commit(output):  # goes on with those that it began with
        begun = json.loads(output.read_text())["arguments"]["methods"]
        return bench(fewer if begun == fewer else table.methods)
    return bench(table.methods) or (not of_this_commit(output) and bench(fewer))


def run_probes(output: Path) -> bool:
    """Microseconds of the host for a call, in the median."""
    if of_this_commit(output):
        return True
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


class Outcomes:
    """Of each test, written as soon as it has run: a plugin of pytest's."""

    def __init__(self, output: Path) -> None:
        before = json.loads(output.read_text()) if of_this_commit(output) else {}
        self._output, self._made = output, provenance()
        self.tests = {
            test["name"]: test
            for test in before.get("tests", [])
            if test["outcome"] != "failed"
        }
        self.ran_before = list(self.tests)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            found = {"outcome": report.outcome, "seconds": report.duration}
            why = {} if report.passed else {"why": report.longreprtext[-2000:]}
            self.tests[report.nodeid] = {"name": report.nodeid} | found | why
            tests = list(self.tests.values())
            write_result(self._output, {"provenance": self._made, "tests": tests})


def run_tests(output: Path, num_workers: int, arguments: list[str]) -> bool:
    outcomes = Outcomes(output)
    command = ["-m", "gpu", "tests/gpu", "-v", "-rN", *arguments]
    command += [f"--deselect={name}" for name in outcomes.ran_before]
    command += ["-n", str(num_workers)] if num_workers > 1 else []
    status = pytest.main(command, plugins=[outcomes])
    is_done = status == pytest.ExitCode.NO_TESTS_COLLECTED and outcomes.ran_before
    return status == pytest.ExitCode.OK or bool(is_done)


def of_this_commit(output: Path) -> bool:
    """Results of a run make the checkout of the next one differ; that is no change."""
    if not output.exists():
        return False
    made = json.loads(output.read_text())["provenance"]
    seen, now = (p["commit"].removesuffix("-dirty") for p in (made, provenance()))
    return bool(now) and seen == now


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPO / "docs/results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:4])
    parser.add_argument("--workers", type=int, default=4, help="tests at once")
    parser.add_argument("pytest_arguments", nargs="*")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # for all sides
    all_well = True
    for part in arguments.parts:
        if part in ("first", "tests"):
            asked = arguments.pytest_arguments + ["-k", FIRST] * (part == "first")
            well = run_tests(folder / "gpu-check.json", arguments.workers, asked)
        elif part == "probes":
            well = run_probes(folder / "gpu-probes.json")
        else:
            well = run_table(part, folder / f"gpu-bench-{part}.json")
        print(f"{part}: {'done' if well else 'FAILED'}", flush=True)
        all_well &= well
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
