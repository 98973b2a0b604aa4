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
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich import box, progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

REPO = Path(__file__).resolve().parent.parent
NUM_PROMPTS = 24
MAX_TOKENS = 128
SERVER_FLAGS = shlex.split(
    "--served-model-name target --dtype float32 --enforce-eager --max-model-len 2048 "
    f"--no-enable-prefix-caching --max-num-seqs {NUM_PROMPTS} "
    f"--kv-cache-memory-bytes {512 << 20} --host 127.0.0.1"
)
START_SECONDS, REQUEST_SECONDS, STOP_SECONDS = 180, 180, 20
LOG_TAIL_LINES = 40

console = Console()


class ServerFailedError(Exception):
    """Carries what to show: the end of the server's log and the reason."""


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    speculative_config: dict[str, Any] | None = None
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Server:
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> httpx.Response:
        # trust_env=False: no proxy stands between us and this machine.
        return httpx.get(self.address + path, timeout=10, trust_env=False)

    def failure(self, reason: str) -> ServerFailedError:
        lines = self.log.read_text(errors="replace").splitlines()
        tail = "\n".join(lines[-LOG_TAIL_LINES:])
        return ServerFailedError(f"{tail}\n\n{reason}; the whole log: {self.log}")


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
    # On a GPU vLLM prefers its V2 runner; emssd's draft model needs V1.
    v1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if torch.cuda.is_available() else {}
    return [
        Method("plain"),
        Method("stock", {"method": "draft_model", **draft}),
        Method(
            "emssd-fixed", {"method": "emssd", "draft_length": "fixed", **draft}, v1
        ),
        Method("emssd", {"method": "emssd", **draft}, v1),
    ]


def read_prompts(path: str) -> list[str]:
    lines = Path(path).read_text().splitlines()[:NUM_PROMPTS]
    return [json.loads(line)["prompt"] for line in lines]


def find_preloads() -> list[Path]:
    """The OpenMP and malloc that vLLM's CPU build wants, where they are present."""
    openmp = Path(sys.prefix) / "lib/libiomp5.so"
    mallocs = sorted(Path("/usr/lib").glob("**/libtcmalloc_minimal.so.4"))
    return [path for path in (openmp, *mallocs[:1]) if path.exists()]


def server_environment(method: Method) -> dict[str, str]:
    """Ours, and on the CPU threads and preloads that are alike for all methods."""
    env = os.environ | {"VLLM_NO_USAGE_STATS": "1"} | method.env
    if not torch.cuda.is_available():
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        env["OMP_NUM_THREADS"] = str(num_cpus())
        env["LD_PRELOAD"] = ":".join(map(str, find_preloads()))
    return env


def num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(
    method: Method, model: str, log: Path, flags: Sequence[str] = SERVER_FLAGS
) -> Iterator[Server]:
    """A healthy server, gone with all its processes however the block ends."""
    port = free_port()
    vllm = Path(sys.executable).parent / "vllm"
    command = [str(vllm), "serve", model, *flags, "--port", str(port)]
    if method.speculative_config:
        command += ["--speculative-config", json.dumps(method.speculative_config)]
    log.write_text(f"{shlex.join(command)}\n")
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=server_environment(method),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own group, so that all of it can be ended
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", process, log)
        wait_until_healthy(server, method.name)
        yield server
    finally:
        stop(process)


def wait_until_healthy(server: Server, name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if (status := server.process.poll()) is not None:
            raise server.failure(f"the {name} server ended with status {status}")
        with suppress(httpx.TransportError):
            if server.get("/health").is_success:
                return
        time.sleep(0.5)
    raise server.failure(f"the {name} server was not up in {START_SECONDS} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask vLLM to end its processes itself; a second Ctrl-C cuts that short."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_counts(server: Server) -> Counter[str]:
    """All counts of drafting on /metrics, summed over engines and labels."""
    text = server.get("/metrics").raise_for_status().text
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(("vllm:spec_decode_", "vllm_emssd:")):
                counts[sample.name] += int(sample.value)
    return counts


async def run_rounds(
    server: Server, prompts: list[str], num_rounds: int, on_done: Callable[[], None]
) -> list[Round]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.address}/v1",
        api_key="none",
        max_retries=0,
        timeout=REQUEST_SECONDS,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:

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
    server: Server,
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
        raise server.failure(f"the {method.name} server: {error!r}") from error
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
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
        commit = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True)
        versions.append(f"commit {commit.strip()}")
    command = shlex.join(["scripts/demo", *sys.argv[1:]])
    return "; ".join([describe_machine(), ", ".join(versions), command])


def describe_machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    loaded = ", ".join(path.name for path in find_preloads()) or "nothing"
    cpu = next(names, platform.machine())
    return f"{cpu}, {num_cpus()} CPUs, {loaded} preloaded"


def keep_serving(server: Server) -> None:
    request = {"model": "target", "prompt": "import ", "max_tokens": 64}
    data = shlex.quote(json.dumps(request))
    url = f"{server.address}/v1/completions"
    print("\nThe emssd server stays up until Ctrl-C. Try it:")
    print(f"curl -s {url} -H 'Content-Type: application/json' -d {data}", flush=True)
    with suppress(KeyboardInterrupt):
        server.process.wait()
        raise server.failure("the emssd server ended by itself")


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
    except ServerFailedError as error:
        console.print(escape(str(error)), style="red", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
