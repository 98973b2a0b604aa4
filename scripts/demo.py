#!/usr/bin/env python3
"""Compare plain decoding, stock draft-model speculation, and emssd fixed and automatic.

Starts `vllm serve` four times, one after the other, with the same flags, sends
each the same concurrent prompts through the OpenAI client and shows tokens/s,
acceptance, draft rows, and whether the greedy outputs are the same tokens.
Exits with 1 if they are not, or if a server failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import httpx
import openai
import torch
from rich import box, progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_emssd.bench.methods import Method
from vllm_emssd.bench.provenance import commit, processor
from vllm_emssd.bench.server_process import (
    ServerError,
    ServerProcess,
    free_port,
    server_process,
    vllm_command,
)
from vllm_emssd.integration.cpu_settings import find_preloads, num_cpus

REPO = Path(__file__).resolve().parent.parent
NUM_PROMPTS = 24
MAX_TOKENS = 128
SERVER_FLAGS = shlex.split(
    "--served-model-name target --dtype float32 --enforce-eager --max-model-len 2048 "
    f"--no-enable-prefix-caching --max-num-seqs {NUM_PROMPTS} "
    f"--kv-cache-memory-bytes {512 << 20} --host 127.0.0.1"
)
START_SECONDS, REQUEST_SECONDS = 180, 180
LOG_TAIL_LINES = 40

console = Console()


@dataclass(frozen=True, slots=True)
class Round:
    seconds: float
    outputs: list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Result:
    """One method's rounds, the first a warm-up, and the counts of the timed ones."""

    method: str
    rounds: list[Round]
    counts: Counter[str]

    @property
    def speeds(self) -> list[float]:
        return [sum(map(len, r.outputs)) / r.seconds for r in self.rounds[1:]]

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)

    @property
    def acceptance_length(self) -> float | None:
        drafts = self.counts["vllm:spec_decode_num_drafts_total"]
        accepted = self.counts["vllm:spec_decode_num_accepted_tokens_total"]
        return 1 + accepted / drafts if drafts else None

    def same_outputs(self, plain: Result) -> list[bool]:
        """By prompt: did every round, warm-up too, give plain's first tokens?"""
        by_prompt = zip(*(r.outputs for r in self.rounds), strict=True)
        expected = plain.rounds[0].outputs
        return [
            set(tokens) == {right}
            for tokens, right in zip(by_prompt, expected, strict=True)
        ]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__.splitlines()[0]
    )
    models, add = REPO / "models", parser.add_argument
    add("--model", default=str(models / "target"))
    add("--draft-model", default=str(models / "draft"))
    add(
        "--prompts", default=str(models / "prompts.jsonl"), help='{"prompt": ...} lines'
    )
    add("--num-speculative-tokens", type=int, default=5)
    add("--rounds", type=int, default=3, help="timed rounds a method")
    add("--keep", action="store_true", help="leave the emssd server up at the end")
    options = parser.parse_args()
    for path in (options.model, options.draft_model, options.prompts):
        if Path(path).is_absolute() and not Path(path).exists():
            parser.error(f"{path} does not exist")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def list_methods(options: argparse.Namespace) -> list[Method]:
    draft = {
        "model": options.draft_model,
        "num_speculative_tokens": options.num_speculative_tokens,
    }
    return [
        Method("plain", None),
        Method("stock", {"method": "draft_model", **draft}),
        Method("emssd-fixed", {"method": "emssd", "draft_length": "fixed", **draft}),
        Method("emssd", {"method": "emssd", **draft}),
    ]


def read_prompts(path: str) -> list[str]:
    lines = Path(path).read_text().splitlines()[:NUM_PROMPTS]
    return [json.loads(line)["prompt"] for line in lines]


def server_environment(method: Method) -> dict[str, str]:
    """Ours, and on the CPU threads and preloads that are alike for all methods."""
    env = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    if (method.speculative_config or {}).get("method") == "emssd":
        # vLLM prefers its V2 runner on a GPU; every machine shows the same one here.
        env["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if not torch.cuda.is_available():
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        env["OMP_NUM_THREADS"] = str(num_cpus())
        env["LD_PRELOAD"] = ":".join(map(str, find_preloads()))
    return env


def serving(
    method: Method, model: str, log: Path, flags: Sequence[str] = SERVER_FLAGS
) -> AbstractContextManager[ServerProcess]:
    """`vllm serve` of one method."""
    port = free_port()
    command = [vllm_command(), "serve", model, *flags, "--port", str(port)]
    if method.speculative_config:
        command += ["--speculative-config", json.dumps(method.speculative_config)]
    env = server_environment(method)
    return server_process(method.name, command, port, log, env, START_SECONDS)


def open_client(server: ServerProcess) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.base_url}/v1",
        api_key="none",
        max_retries=0,
        timeout=REQUEST_SECONDS,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    )


def read_counts(server: ServerProcess) -> Counter[str]:
    """All counts of drafting."""
    return Counter(
        {
            name: int(value)
            for name, value in server.metrics().items()
            if name.startswith(("vllm:spec_decode_", "vllm_emssd:"))
        }
    )


async def run_rounds(
    server: ServerProcess,
    prompts: list[str],
    num_rounds: int,
    on_done: Callable[[], None],
) -> list[Round]:
    async with open_client(server) as client:

        async def complete(prompt: str) -> tuple[int, ...]:
            answer = await client.completions.create(
                model="target",
                prompt=prompt,
                temperature=0,
                max_tokens=MAX_TOKENS,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            on_done()
            return tuple(answer.choices[0].model_extra["token_ids"])

        rounds = []
        for _ in range(num_rounds):
            start = time.perf_counter()
            outputs = await asyncio.gather(*map(complete, prompts))
            rounds.append(Round(time.perf_counter() - start, outputs))
        return rounds


def measure(
    server: ServerProcess,
    method: Method,
    prompts: list[str],
    num_rounds: int,
    on_done: Callable[[], None],
) -> Result:
    try:
        warm_up = asyncio.run(run_rounds(server, prompts, 1, lambda: None))
        before = read_counts(server)
        timed = asyncio.run(run_rounds(server, prompts, num_rounds, on_done))
        counts = read_counts(server)
    except (openai.APIError, httpx.HTTPError) as error:
        raise ServerError(server, f"failed: {error!r}") from error
    counts.subtract(before)
    return Result(method.name, warm_up + timed, counts)


def make_table(results: list[Result]) -> Table:
    plain, stock, fixed, _ = results
    padded_rows = fixed.counts["vllm_emssd:num_padded_draft_rows_total"]
    draft_rows = {"plain": "-", "stock": f"{padded_rows:,} *"}
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nmethod", no_wrap=True)
    for title in (
        "tokens/s\n(range)",
        "over\nplain",
        "over\nstock",
        "acceptance\nlength",
        "draft\nrows",
        "same as\nplain",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        speeds, length = result.speeds, result.acceptance_length
        same = result.same_outputs(plain)
        table.add_row(
            result.method,
            f"{result.speed:.0f} ({min(speeds):.0f}-{max(speeds):.0f})",
            format_ratio(result, plain),
            format_ratio(result, stock),
            f"{length:.2f}" if length else "-",
            draft_rows.get(result.method)
            or f"{result.counts['vllm_emssd:num_draft_rows_total']:,}",
            f"{'yes' if all(same) else '[red]no[/]'}, {sum(same)}/{len(same)}",
        )
    return table


def format_ratio(result: Result, other: Result) -> str:
    ratio = result.speed / other.speed
    colour = "red" if ratio < 1 else "green"
    return "-" if result is other else f"[{colour}]{ratio:.2f}x[/]"


def losses(results: list[Result]) -> Iterator[str]:
    """A sentence for each method that is slower than one before it."""
    for other, result in combinations(results, 2):
        if result.speed < other.speed:
            yield (
                f"{result.method} is slower than {other.method} here, by "
                f"{1 - result.speed / other.speed:.1%} "
                f"({result.speed:.0f} against {other.speed:.0f} tokens/s)."
            )


def report(results: list[Result], logs: Path) -> None:
    console.print(make_table(results))
    console.print(
        "* not measured, vLLM does not count them: what a padded drafter would have "
        "been fed in emssd-fixed's steps",
        soft_wrap=True,
    )
    for sentence in losses(results):
        console.print(f"[red]{sentence}[/]")
    console.print(escape(describe_run()), highlight=False, soft_wrap=True)
    console.print(f"server logs: {logs}", highlight=False, soft_wrap=True)


def describe_run() -> str:
    """What a reader needs to repeat the numbers, in one line."""
    versions = [f"{name} {version(name)}" for name in ("vllm", "torch", "vllm-emssd")]
    if found := commit(REPO):
        versions.append(f"commit {found}")
    command = shlex.join(["scripts/demo", *sys.argv[1:]])
    return "; ".join([describe_machine(), ", ".join(versions), command])


def describe_machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    loaded = ", ".join(path.name for path in find_preloads()) or "nothing"
    return f"{processor()}, {num_cpus()} CPUs, {loaded} preloaded"


def keep_serving(server: ServerProcess) -> None:
    request = {"model": "target", "prompt": "import ", "max_tokens": 64}
    data = shlex.quote(json.dumps(request))
    url = f"{server.base_url}/v1/completions"
    print("\nThe emssd server stays up until Ctrl-C. Try it:")
    print(f"curl -s {url} -H 'Content-Type: application/json' -d {data}", flush=True)
    with suppress(KeyboardInterrupt):
        server.process.wait()
        raise ServerError(server, "ended by itself")


def describe_failure(error: ServerError) -> str:
    server = error.server
    return (
        f"{server.end_of_log(LOG_TAIL_LINES)}\n\n"
        f"the {server.name} server {error.what}; the whole log: {server.log}"
    )


def run(options: argparse.Namespace) -> int:
    prompts = read_prompts(options.prompts)
    logs = Path(tempfile.mkdtemp(prefix="emssd-demo-"))
    results: list[Result] = []
    bars = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        console=console,
        refresh_per_second=2,  # drawing takes time from the server
    )
    with ExitStack() as running:
        with bars:
            for method in list_methods(options):
                running.close()  # one server at a time has the whole machine
                bar = bars.add_task(method.name, total=options.rounds * len(prompts))
                log = logs / f"{method.name}.log"
                server = running.enter_context(serving(method, options.model, log))
                on_done = partial(bars.advance, bar)
                result = measure(server, method, prompts, options.rounds, on_done)
                results.append(result)
                bars.stop_task(bar)
        report(results, logs)
        if options.keep:
            keep_serving(server)
    plain = results[0]
    return 0 if all(all(r.same_outputs(plain)) for r in results) else 1


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        return run(parse_options())
    except ServerError as error:
        text = describe_failure(error)
        console.print(escape(text), style="red", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
