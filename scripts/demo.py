#!/usr/bin/env python3
"""Serve chats, edits and summaries with and without emssd, and compare.

The chat model is SmolLM2-135M-Instruct from the package index, with the draft model
of this repository; without a network, the small pair that is shipped. All engines stay
up and take turns, so that whatever else the machine does falls on all of them. Prints
a table, draws a figure and checks that all give the tokens of plain decoding.
Exits with 1 if they do not, or if an engine failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fetch_smollm2 import FetchError, fetch_pair
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer

from vllm_emssd.bench.comparison import compare_all
from vllm_emssd.bench.engine_process import EngineError, EngineOptions, shared_gpu
from vllm_emssd.bench.harness import Plan, Rounds, measure
from vllm_emssd.bench.methods import Method
from vllm_emssd.bench.plots import SIZE, draw_speed_up
from vllm_emssd.bench.provenance import provenance
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import Round
from vllm_emssd.bench.workloads import CHATS, WorkloadOptions, load_workload
from vllm_emssd.integration.cpu.settings import (
    cpu_settings,
    has_nvidia_gpu,
    num_cpus,
)

MODELS = Path(__file__).parents[1] / "models"
NUM_PROMPTS = 24
MAX_PROMPT_TOKENS = 320
KV_CACHE_MIB = 512
MAX_MODEL_LEN = 512
COPIES = {"check_length": 2, "copy_length": 7}

Result = dict[str, Any]  # of one number of requests at once
console = Console()


@dataclass(frozen=True, slots=True)
class Prompts:
    """What is asked, and of which kind each is."""

    kinds: list[str]
    requests: list[Request]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer methods, rounds and tokens")
    add("--shipped", action="store_true", help="the shipped pair, no chat model")
    add("--model", help="a chat model of your own; needs --draft-model")
    add("--draft-model", help="with the same tokenizer")
    add("--batches", type=int, nargs="+", help="chats at once (default: 1 8 24)")
    add("--rounds", type=int, help="timed, of each method and number of chats")
    add(
        "--dtype",
        default="float32",
        help="default: float32, in which equal methods give equal tokens; bfloat16 "
        "rounds differently with the number of rows, and near-ties may differ",
    )
    add("--figure", type=Path, default=Path("demo.png"), help="where to draw it")
    options = parser.parse_args()
    if (options.model is None) != (options.draft_model is None):
        parser.error("--model and --draft-model go together")
    options.batches = options.batches or ([8, 24] if options.quick else [1, 8, 24])
    options.rounds = options.rounds or (2 if options.quick else 3)
    if min(options.batches) < 1 or max(options.batches) > NUM_PROMPTS:
        parser.error(f"--batches must be from 1 to {NUM_PROMPTS}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def choose_pair(options: argparse.Namespace) -> tuple[Path | str, Path | str]:
    if options.model is not None:
        return options.model, options.draft_model
    if not options.shipped:
        try:
            return fetch_pair(say=lambda text: console.print(text, highlight=False))
        except FetchError as error:
            console.print(f"[yellow]{escape(str(error))}[/]", highlight=False)
            console.print("Going on with the small pair that is in the repository.")
    return MODELS / "target", MODELS / "draft"


def read_prompts(tokenizer: Any, max_tokens: int) -> Prompts:
    """24, the kinds in turns; completions where the model has no chat template."""
    workload, kinds = "chats", [*CHATS]
    if tokenizer.chat_template is None:
        workload, kinds = "completion", ["completion"]
    options = WorkloadOptions(max_tokens, MAX_PROMPT_TOKENS)
    requests = load_workload(workload, tokenizer, options, NUM_PROMPTS).requests
    return Prompts(kinds * (NUM_PROMPTS // len(kinds)), requests)


def list_methods(draft_model: Path | str, quick: bool) -> list[Method]:
    model = {"model": str(draft_model)}
    stock = model | {"method": "draft_model"}
    auto = model | {
        "method": "emssd",
        "draft_length": "auto",
        "num_speculative_tokens": 8,
    }
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": COPIES["copy_length"],
        "prompt_lookup_min": COPIES["check_length"],
        "prompt_lookup_max": COPIES["check_length"],
    }
    return [
        Method("plain", None),
        *(
            Method(f"stock K={k}", stock | {"num_speculative_tokens": k})
            for k in ((2, 5) if quick else (1, 3, 5))
        ),
        Method("stock ngram", ngram),
        Method("emssd auto", auto),
        Method("emssd mixed", auto | COPIES | {"proposer": "mixed"}),
    ]


def make_table(measured: Rounds, results: list[Result], prompts: Prompts) -> Table:
    kinds = list(dict.fromkeys(prompts.kinds))
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\n\nmethod", no_wrap=True)
    for result in results:
        title = f"tokens/s\n(over plain)\n{result['batch']} at once"
        table.add_column(title, justify="right", no_wrap=True)
    for kind in kinds:
        table.add_column(f"tokens\na step,\n{kind}", justify="right", no_wrap=True)
    for title in ("rows a token\n\ntarget+draft", "same as\nplain's\noutputs"):
        table.add_column(title, justify="right", no_wrap=True)
    total = num_outputs(measured)
    for name, of_method in measured[results[-1]["batch"]].items():
        last = of_method[-1]
        rows = (last.target_rows / last.num_tokens, last.draft_rows / last.num_tokens)
        same = total - len(list(differences(measured, name)))
        table.add_row(
            name,
            *(format_speed(result, name) for result in results),
            *(f"{tokens_a_step(last, prompts, kind):.2f}" for kind in kinds),
            f"{rows[0]:.2f}+{rows[1]:.2f}",
            f"[{'green' if same == total else 'red'}]{same} of {total}[/]",
        )
    return table


def num_outputs(measured: Rounds) -> int:
    """Of different prompts."""
    return max(len(rounds["plain"][0].outputs) for rounds in measured.values())


def format_speed(result: Result, name: str) -> str:
    speed = f"{result['methods'][name]['tokens_per_s']:.0f}"
    if name == "plain":
        return f"{speed} (1.00)"
    ratio = result["ratios"][f"{name}/plain"]["ratio"]
    return f"{speed} ([{'red' if ratio < 1 else 'green'}]{ratio:.2f}[/])"


def tokens_a_step(done: Round, prompts: Prompts, kind: str) -> float:
    """Of requests of one kind, after their first token."""
    sampled = [
        entry.num_sampled
        for entry in done.decode_steps()
        if prompts.kinds[entry.request] == kind
    ]
    return sum(sampled) / len(sampled) if sampled else math.nan


@dataclass(frozen=True, slots=True)
class Difference:
    prompt: int
    position: int  # of the first token that differs
    tokens: tuple[int | None, int | None]  # plain's and the method's there


def differences(measured: Rounds, name: str) -> Iterator[Difference]:
    """By prompt, the first round of any batch size that is not as plain's first."""
    wanted: dict[int, list[int]] = {}
    for rounds in measured.values():
        for prompt, tokens in enumerate(rounds["plain"][0].outputs):
            wanted.setdefault(prompt, tokens)
    found: set[int] = set()
    for rounds in measured.values():
        for done in rounds[name]:
            for prompt, tokens in enumerate(done.outputs):
                if tokens != wanted[prompt] and prompt not in found:
                    found.add(prompt)
                    yield _difference(prompt, wanted[prompt], tokens)


def _difference(prompt: int, wanted: list[int], tokens: list[int]) -> Difference:
    pairs = zip_longest(wanted, tokens)
    position, both = next((i, pair) for i, pair in enumerate(pairs) if len({*pair}) > 1)
    return Difference(prompt, position, both)


def describe_differences(
    measured: Rounds, names: Iterable[str], tokenizer: Any, dtype: str
) -> Iterator[str]:
    for name in names:
        found = list(differences(measured, name))
        if not found:
            continue
        first = found[0]
        plain, own = (
            "the end" if token is None else repr(tokenizer.decode([token]))
            for token in first.tokens
        )
        yield (
            f"{name}: {len(found)} of {num_outputs(measured)} outputs are not plain's; "
            f"the first is of prompt {first.prompt + 1}, from token "
            f"{first.position + 1} on: {own} where plain has {plain}."
        )
        if dtype != "float32":
            yield (
                f"In {dtype} a near-tie may go another way where rows are computed in "
                "other numbers, without emssd too; --dtype float32 tells."
            )


def losses(results: list[Result]) -> Iterator[str]:
    """A sentence for each case in which emssd is slower than another method."""
    for result in results:
        speeds = {name: m["tokens_per_s"] for name, m in result["methods"].items()}
        others = [name for name in speeds if not name.startswith("emssd")]
        best = max(others, key=speeds.__getitem__)
        for name in speeds:
            if name not in others and speeds[name] < speeds[best]:
                yield (
                    f"{name} is slower than {best} at {result['batch']} at once, by "
                    f"{1 - speeds[name] / speeds[best]:.1%}."
                )


def draw(results: list[Result], caption: str, path: Path) -> None:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    draw_speed_up(axes, {"results": results})
    axes.set_title("chats, edits and summaries")
    axes.set_xlabel("requests at once")
    figure.text(0.01, 0.005, caption, fontsize=6, color="grey")
    figure.savefig(path, dpi=150)


def describe_run(model: Path | str, dtype: str) -> str:
    """What a reader needs to repeat the numbers."""
    made = provenance()
    machine = made["gpus"][0] if made["gpus"] else made["machine"]
    versions = f"vLLM {made['vllm']}, torch {made['torch']}, commit {made['commit']}"
    command = shlex.join(["scripts/demo", *sys.argv[1:]])
    return f"{Path(model).name}, {dtype}; {machine}; {versions}; {command}"


def run(options: argparse.Namespace) -> int:
    model, draft_model = choose_pair(options)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = read_prompts(tokenizer, 64 if options.quick else 96)
    methods = list_methods(draft_model, options.quick)
    logs = Path(tempfile.mkdtemp(prefix="emssd-demo-"))
    console.print(f"comparing {len(methods)} methods; vLLM's logs: {logs}")
    plan = Plan(methods, options.batches, options.rounds, starts_together=True)
    measured = measure(
        plan, engine_options(str(model), options, logs, len(methods)), prompts.requests
    )
    results = compare_all(measured)
    names = [method.name for method in methods]
    console.print(make_table(measured, results, prompts))
    wrong = list(describe_differences(measured, names, tokenizer, options.dtype))
    for sentence in [*wrong, *losses(results)]:
        console.print(f"[red]{escape(sentence)}[/]", highlight=False)
    said = describe_run(model, options.dtype)
    draw(results, said, options.figure)
    console.print(escape(said), highlight=False, soft_wrap=True)
    console.print(
        f"figure: {options.figure}; vLLM's logs: {logs}\n"
        f"serve it: {escape(serve_command(str(model), methods[-2]))}",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if wrong else 0


def engine_options(
    model: str, options: argparse.Namespace, logs: Path, num_engines: int
) -> EngineOptions:
    """Prompts are cached, as vLLM does by default: the rounds time decoding."""
    engine_args = {
        "model": model,
        "dtype": options.dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max(options.batches),
        "kv_cache_memory_bytes": KV_CACHE_MIB << 20,
        "enable_prefix_caching": True,
        "enforce_eager": not has_nvidia_gpu(),  # compiling takes a minute each
    }
    return EngineOptions(engine_args | shared_gpu(num_engines), logs=logs)


def serve_command(model: str, method: Method) -> str:
    config = json.dumps(method.speculative_config)
    return shlex.join(["vllm", "serve", model, "--speculative-config", config])


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if not has_nvidia_gpu():
        os.environ |= cpu_settings(os.environ, num_cpus())  # for the engines
    try:
        return run(parse_options())
    except EngineError as error:
        console.print(escape(str(error)), style="red", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
