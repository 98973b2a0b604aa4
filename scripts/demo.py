"""Serve chats, edits and summaries with and without emssd, and compare.

The chat model is SmolLM2-135M-Instruct from the package index. On a CPU the EAGLE-3
head of this repository drafts for it. On a GPU, where heads have not run yet, emssd
only copies. Without a network it is the small pair that is shipped. All engines stay
up and take turns, so that whatever else the machine does falls on all of them. Prints
a table, draws a figure, writes what they show beside it as JSON, and checks that all
give the tokens of plain decoding. Exits with 1 if they do not, or if an engine failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer

from vllm_emssd.bench.comparison import compare_all
from vllm_emssd.bench.engine_process import EngineError, EngineOptions, shared_gpu
from vllm_emssd.bench.harness import Plan, Rounds, measure
from vllm_emssd.bench.methods import Method, stock_method
from vllm_emssd.bench.plots import SIZE, draw_speed_up
from vllm_emssd.bench.provenance import provenance
from vllm_emssd.bench.report import write_result
from vllm_emssd.bench.round import Round
from vllm_emssd.bench.smollm2 import FetchError, fetch
from vllm_emssd.bench.workloads import (
    CHATS,
    DESCRIPTIONS,
    WorkloadOptions,
    load_workload,
)
from vllm_emssd.integration.cpu.settings import has_nvidia_gpu, settings_here

MODELS = Path(__file__).parents[1] / "models"
NUM_PROMPTS = 24
PROMPTS_A_ROUND = {1: 3, 8: 24, 24: 24}  # by requests at once, all kinds in each
NUM_OUTPUT_TOKENS = 48
NUM_ROUNDS = 2
MAX_PROMPT_TOKENS, MAX_MODEL_LEN = 320, 512
KV_CACHE_MIB = 512
BLOCK_SIZE = 32  # of a cached prompt less than a block is computed again
# K of vLLM's own method: 5, and the best with the demo's pairs at 8 requests, which is
# all that --quick measures.
STOCK_LENGTH, BEST_STOCK_LENGTH = 5, {"eagle3": 1, "draft_model": 5}

Result = dict[str, Any]  # of one number of requests at once
Output = tuple[list[int], bool]  # tokens, and whether it was not cut by a round's end
console = Console(highlight=False)
console.width = max(console.width, 120)  # of the table: a narrower one cuts numbers


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer loads and methods")
    add("--shipped", action="store_true", help="the shipped pair, no chat model")
    add("--model", help="a chat model of your own; needs --draft-model")
    add("--draft-model", help="with the same tokenizer")
    add("--dtype", default="float32", help="in bfloat16 near-ties may differ")
    add("--figure", type=Path, default=Path("demo.png"), help="where to draw it")
    options = parser.parse_args()
    if (options.model is None) != (options.draft_model is None):
        parser.error("--model and --draft-model go together")
    return options


def choose_pair(options: argparse.Namespace) -> tuple[str, str | None]:
    """The target and its draft model, if there is one that runs here."""
    if options.model is not None:
        return options.model, options.draft_model
    if not options.shipped:
        try:
            head = None if has_nvidia_gpu() else str(MODELS / "smollm2-eagle3")
            return str(fetch()), head
        except FetchError as error:
            console.print(f"[yellow]{escape(str(error))}[/]")
            console.print("Going on with the small pair that is in the repository.")
    return str(MODELS / "target"), str(MODELS / "draft")


def list_methods(draft_model: str | None, is_quick: bool = False) -> list[Method]:
    ngram = {"method": "ngram", "num_speculative_tokens": 7}  # as the paper copies
    ngram |= {"prompt_lookup_min": 2, "prompt_lookup_max": 2}
    copying = [Method("plain", None), Method("stock ngram", ngram)]
    if draft_model is None:
        return [*copying, Method("emssd llma", {"method": "emssd"})]
    name = stock_method(draft_model)
    stock = {"method": name, "model": draft_model}
    best = BEST_STOCK_LENGTH[name]
    lengths = [best] if is_quick else sorted({best, STOCK_LENGTH})
    auto = {"method": "emssd", "model": draft_model, "draft_length": "auto"}
    return [
        *copying,
        *(
            Method(f"stock {name} K={k}", stock | {"num_speculative_tokens": k})
            for k in lengths
        ),
        Method("emssd auto", auto | {"proposer": "mixed"}),
    ]


# ---------------------------------------------------------------- what is said of it


def make_table(measured: Rounds, results: list[Result], kinds: list[str]) -> Table:
    """A row a method; `kinds` has the kind of each prompt."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\n\nmethod", no_wrap=True)
    batches = [result["batch"] for result in results]
    titles = [f"tokens/s\n(over plain)\n{batch} at once" for batch in batches]
    titles += [f"tokens\na step,\n{kind}" for kind in dict.fromkeys(kinds)]
    for title in (*titles, "rows a token\n\ntarget+draft", "same as\nplain's\noutputs"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, found in describe_outputs(measured, kinds).items():
        same = found["same_as_plain"]
        table.add_row(
            name,
            *(format_speed(result, name) for result in results),
            *(f"{tokens:.2f}" for tokens in found["tokens_a_step"].values()),
            "{:.2f}+{:.2f}".format(*found["rows_a_token"]),
            f"[{'green' if same == len(kinds) else 'red'}]{same} of {len(kinds)}[/]",
        )
    return table


def describe_outputs(measured: Rounds, kinds: list[str]) -> dict[str, Result]:
    """By method: of the last round how drafts fared, and how many prompts always gave
    plain's output."""
    return {
        name: {
            "tokens_a_step": {
                kind: tokens_a_step(last, kinds, kind) for kind in dict.fromkeys(kinds)
            },
            "rows_a_token": (
                last.target_rows / last.num_tokens,
                last.draft_rows / last.num_tokens,
            ),
            "same_as_plain": len(
                prompts_with_outputs(measured, name, len(kinds))
                - different_prompts(measured, name, len(kinds)).keys()
            ),
        }
        for name, (*_, last) in measured[max(measured)].items()
    }


def format_speed(result: Result, name: str) -> str:
    speeds = {name: found["tokens_per_s"] for name, found in result["methods"].items()}
    ratio = 1.0 if name == "plain" else result["ratios"][f"{name}/plain"]["ratio"]
    return f"{speeds[name]:.0f} ([{'red' if ratio < 1 else 'green'}]{ratio:.2f}[/])"


def tokens_a_step(done: Round, kinds: list[str], kind: str) -> float:
    """Of requests of one kind, after their first token."""
    steps = [
        step.num_sampled
        for step in done.decode_steps()
        if kinds[step.request % len(kinds)] == kind
    ]
    return sum(steps) / max(len(steps), 1)


def prompts_with_outputs(measured: Rounds, name: str, num_prompts: int) -> set[int]:
    outputs = _outputs(measured, name, num_prompts)
    return {prompt for prompt, (tokens, _) in outputs if tokens}


def different_prompts(
    measured: Rounds, name: str, num_prompts: int
) -> dict[int, list[list[int]]]:
    """Prompts of which an output is not plain's: plain's, and the first such."""
    # Of several outputs of a prompt the last in this order is kept: the longest.
    plain = dict(sorted(_outputs(measured, "plain", num_prompts), key=_how_whole))
    found: dict[int, list[list[int]]] = {}
    for prompt, output in _outputs(measured, name, num_prompts):
        if prompt in plain and not _agree(plain[prompt], output):
            found.setdefault(prompt, [plain[prompt][0], output[0]])
    return found


def _outputs(
    measured: Rounds, name: str, num_prompts: int
) -> Iterator[tuple[int, Output]]:
    """Of all rounds: prompt, and what it gave. Prompts come around again."""
    for rounds in measured.values():
        for done in rounds[name]:
            for i, tokens in enumerate(done.outputs):
                yield i % num_prompts, (tokens, i not in done.unfinished)


def _how_whole(of_prompt: tuple[int, Output]) -> tuple[bool, int]:
    _, (tokens, is_finished) = of_prompt
    return is_finished, len(tokens)


def _agree(*outputs: Output) -> bool:
    """As far as both go; one that has ended must be no shorter."""
    (few, has_ended), (more, _) = sorted(outputs, key=lambda output: len(output[0]))
    return more[: len(few)] == few and (len(few) == len(more) or not has_ended)


def describe_differences(
    measured: Rounds, methods: list[Method], tokenizer: Any, num_prompts: int
) -> Iterator[str]:
    """A sentence for each method whose outputs are not plain decoding's."""
    for name in (method.name for method in methods):
        found = different_prompts(measured, name, num_prompts)
        for prompt, outputs in islice(found.items(), 1):
            pairs = enumerate(zip_longest(*outputs), 1)
            at, tokens = next(pair for pair in pairs if len({*pair[1]}) > 1)
            plain, own = (i if i is None else tokenizer.decode([i]) for i in tokens)
            yield (
                f"{name}: {len(found)} outputs are not plain's; in that of prompt "
                f"{prompt + 1}, token {at} is {own!r} where plain has {plain!r}."
            )


def losses(results: list[Result]) -> Iterator[str]:
    """A sentence for each case in which emssd is slower than another method."""
    for result in results:
        speeds = {name: m["tokens_per_s"] for name, m in result["methods"].items()}
        others = [name for name in speeds if not name.startswith("emssd")]
        best = max(others, key=speeds.__getitem__)
        for name, speed in speeds.items():
            if name not in others and speed < speeds[best]:
                yield (
                    f"{name} is slower than {best} at {result['batch']} at once, by "
                    f"{1 - speed / speeds[best]:.1%}."
                )


def describe_run(model: str, dtype: str, made: Result) -> str:
    """What a reader needs to repeat the numbers."""
    machine = made["gpus"][0] if made["gpus"] else f"{made['machine']}, eager"
    versions = f"vLLM {made['vllm']}, torch {made['torch']}, commit {made['commit']}"
    return f"{Path(model).name}, {dtype}; {machine}; {versions}; {made['command']}"


def draw(results: list[Result], title: str, caption: str, path: Path) -> None:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    draw_speed_up(axes, {"results": results})
    axes.set_title(title)
    figure.text(0.01, 0.005, caption, fontsize=6, color="grey")
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- the command


def run(options: argparse.Namespace) -> int:
    model, draft_model = choose_pair(options)
    tokenizer = AutoTokenizer.from_pretrained(model)
    methods = list_methods(draft_model, options.quick)
    logs = Path(tempfile.mkdtemp(prefix="emssd-demo-"))
    console.print(f"comparing {len(methods)} methods; vLLM's logs: {logs}")
    is_chat = tokenizer.chat_template is not None
    workload = WorkloadOptions(NUM_OUTPUT_TOKENS, MAX_PROMPT_TOKENS)
    name = "chats" if is_chat else "completion"
    loaded = load_workload(name, tokenizer, workload, NUM_PROMPTS)
    kinds = [*CHATS] * (NUM_PROMPTS // 3) if is_chat else [name] * NUM_PROMPTS

    engine_args = {
        "model": model,
        "dtype": options.dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": NUM_PROMPTS,
        "kv_cache_memory_bytes": KV_CACHE_MIB << 20,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": True,  # as by default: the rounds time decoding
        "enforce_eager": not has_nvidia_gpu(),  # compiling takes a minute each
    }
    engines = EngineOptions(engine_args | shared_gpu(len(methods)), logs=logs)
    batches = [8, 24] if options.quick else [*PROMPTS_A_ROUND]
    times = 1 if is_chat else 4  # else the small pair has rounds of 0.3 s
    plan = Plan(
        methods,
        batches,
        NUM_ROUNDS,
        {n: times * num for n, num in PROMPTS_A_ROUND.items()},
        is_continuous=True,  # as in a server
        starts_together=True,
    )
    # Prompts come around again.
    measured = measure(plan, engines, loaded.requests * (1 + times))

    results = compare_all(measured)
    console.print(make_table(measured, results, kinds))
    wrong = [*describe_differences(measured, methods, tokenizer, NUM_PROMPTS)]
    for sentence in [*wrong, *losses(results)]:
        console.print(f"[red]{escape(sentence)}[/]")
    made = provenance() | {"command": shlex.join(["scripts/demo", *sys.argv[1:]])}
    said = describe_run(model, options.dtype, made)
    draw(results, f"{name}: {DESCRIPTIONS[name]}", said, options.figure)
    table = {"provenance": made, "engine": engine_args, "workload": loaded.summary()}
    table |= {"results": results, "outputs": describe_outputs(measured, kinds)}
    path = options.figure.with_suffix(".json")
    write_result(path, table)
    config = json.dumps(methods[-1].speculative_config)
    command = shlex.join(["vllm", "serve", model, "--speculative-config", config])
    console.print(
        escape(f"{said}\nfigure: {options.figure}, table: {path}\nserve it: {command}"),
        soft_wrap=True,
    )
    return 1 if wrong else 0


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if not has_nvidia_gpu():
        os.environ |= settings_here(os.environ)  # for the engines
    try:
        return run(parse_options())
    except EngineError as error:
        console.print(escape(str(error)), style="red")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
