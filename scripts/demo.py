#!/usr/bin/env python3
"""Compare plain decoding, stock draft-model speculation and emssd, side by side.

    scripts/demo [--keep] [--rounds 3] [--model DIR] [--draft-model DIR]

Starts `vllm serve` three times, one after the other, with the same flags, sends
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
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn
from rich.table import Table

REPO = Path(__file__).resolve().parent.parent
SERVED_NAME = "target"
NUM_PROMPTS = 24
MAX_TOKENS = 128
SERVER_FLAGS = shlex.split(
    "--dtype float32 --enforce-eager --max-model-len 2048 --no-enable-prefix-caching "
    f"--max-num-seqs {NUM_PROMPTS} --kv-cache-memory-bytes {512 << 20}"
)
START_SECONDS = 180
STOP_SECONDS = 20
REQUEST_SECONDS = 180
LOG_TAIL_LINES = 40

Tokens = tuple[int, ...]
console = Console()


class ServerFailedError(Exception):
    """Carries what to show: the reason and the end of the server's log."""


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

    def failure(self, reason: str) -> ServerFailedError:
        lines = self.log.read_text(errors="replace").splitlines()
        tail = "\n".join(lines[-LOG_TAIL_LINES:])
        return ServerFailedError(f"{tail}\n\n{reason}; the whole log: {self.log}")


@dataclass(frozen=True, slots=True)
class Round:
    seconds: float
    outputs: list[Tokens]

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.outputs)) / self.seconds


@dataclass(frozen=True, slots=True)
class Result:
    """What one method did in its timed rounds; the warm-up's outputs count too."""

    method: str
    warm_up: Round
    rounds: list[Round]
    counts: Counter[str]

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(r.tokens_per_second for r in self.rounds)

    @property
    def acceptance_length(self) -> float | None:
        drafts = self.counts["vllm:spec_decode_num_drafts_total"]
        accepted = self.counts["vllm:spec_decode_num_accepted_tokens_total"]
        return 1 + accepted / drafts if drafts else None

    def num_same(self, reference: list[Tokens]) -> int:
        """Prompts that got the reference's tokens in every single round."""
        rounds = [self.warm_up, *self.rounds]
        return sum(
            all(r.outputs[i] == tokens for r in rounds)
            for i, tokens in enumerate(reference)
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__.splitlines()[0]
    )
    models = REPO / "models"
    parser.add_argument("--model", default=str(models / "target"))
    parser.add_argument("--draft-model", default=str(models / "draft"))
    parser.add_argument(
        "--prompts", default=str(models / "prompts.jsonl"), help='lines {"prompt": ...}'
    )
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds a method")
    parser.add_argument(
        "--keep", action="store_true", help="leave the emssd server up at the end"
    )
    options = parser.parse_args()
    for path in (options.model, options.draft_model, options.prompts):
        if Path(path).is_absolute() and not Path(path).exists():
            parser.error(f"{path} does not exist")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def methods(options: argparse.Namespace) -> list[Method]:
    draft = {
        "model": options.draft_model,
        "num_speculative_tokens": options.num_speculative_tokens,
    }
    # On a GPU vLLM prefers its V2 runner; emssd's draft model needs V1.
    v1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if torch.cuda.is_available() else {}
    return [
        Method("plain"),
        Method("stock", {"method": "draft_model", **draft}),
        Method("emssd", {"method": "emssd", **draft}, v1),
    ]


def read_prompts(path: str) -> list[str]:
    lines = Path(path).read_text().splitlines()[:NUM_PROMPTS]
    return [json.loads(line)["prompt"] for line in lines]


def preloads() -> list[Path]:
    """The OpenMP and malloc that vLLM's CPU build wants, where they are present."""
    openmp = Path(sys.prefix) / "lib/libiomp5.so"
    found = [openmp] if openmp.exists() else []
    return found + sorted(Path("/usr/lib").glob("**/libtcmalloc_minimal.so.4"))[:1]


def common_environment() -> dict[str, str]:
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    if torch.cuda.is_available():
        return env
    given = [p for p in (os.environ.get("LD_PRELOAD"),) if p]
    return {
        **env,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(num_cpus()),
        "LD_PRELOAD": ":".join([*map(str, preloads()), *given]),
    }


def num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(method: Method, model: str, log: Path) -> Iterator[Server]:
    """A healthy server, gone with all its processes however the block ends."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", model]
    command += ["--served-model-name", SERVED_NAME, *SERVER_FLAGS]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if method.speculative_config:
        command += ["--speculative-config", json.dumps(method.speculative_config)]
    with log.open("wb") as output:
        output.write(f"{shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            env={**common_environment(), **method.env},
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
        if server.process.poll() is not None:
            code = server.process.returncode
            raise server.failure(f"the {name} server ended with status {code}")
        with suppress(httpx.TransportError):
            if get(server, "/health").is_success:
                return
        time.sleep(0.5)
    raise server.failure(f"the {name} server was not up in {START_SECONDS} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """The last signal goes to the group even if a second Ctrl-C cuts the wait."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def get(server: Server, path: str) -> httpx.Response:
    # trust_env=False: no proxy stands between us and this machine.
    return httpx.get(server.address + path, timeout=5, trust_env=False)


def read_counts(server: Server) -> Counter[str]:
    """Every `*_total` of drafting on /metrics, summed over engines and labels."""
    response = get(server, "/metrics").raise_for_status()
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(response.text):
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

        async def complete(prompt: str) -> Tokens:
            answer = await client.completions.create(
                model=SERVED_NAME,
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
    on_state: Callable[[str], None],
    on_done: Callable[[], None],
) -> Result:
    try:
        on_state("warm-up")
        [warm_up] = asyncio.run(run_rounds(server, prompts, 1, lambda: None))
        on_state("timed")
        before = read_counts(server)
        rounds = asyncio.run(run_rounds(server, prompts, num_rounds, on_done))
        counts = read_counts(server)
    except (openai.APIError, httpx.HTTPError) as error:
        raise server.failure(f"the {method.name} server: {error!r}") from error
    counts.subtract(before)
    return Result(method.name, warm_up, rounds, counts)


def result_table(results: list[Result]) -> Table:
    plain, stock, emssd = results
    table = Table(title=f"{len(plain.warm_up.outputs)} requests at once, greedy")
    table.add_column("method")
    for title in ("tokens/s (range)", "over plain", "over stock", "acceptance length"):
        table.add_column(title, justify="right")
    table.add_column("draft rows", justify="right")
    table.add_column("same tokens as plain")
    padded = emssd.counts["vllm_emssd:num_padded_draft_rows_total"]
    rows = emssd.counts["vllm_emssd:num_draft_rows_total"]
    for result, drafted in (
        (plain, "-"),
        (stock, f"{padded:,} *"),
        (emssd, f"{rows:,}"),
    ):
        table.add_row(
            result.method,
            speed_range(result),
            speed_up(result, plain),
            speed_up(result, stock),
            f"{length:.2f}" if (length := result.acceptance_length) else "-",
            drafted,
            sameness(result, plain),
        )
    return table


def speed_range(result: Result) -> str:
    speeds = [r.tokens_per_second for r in result.rounds]
    median = f"{result.tokens_per_second:.0f}"
    return f"{median} ({min(speeds):.0f}-{max(speeds):.0f})"


def speed_up(result: Result, other: Result) -> str:
    if result is other:
        return "-"
    ratio = result.tokens_per_second / other.tokens_per_second
    colour = "red" if ratio < 1 else "green"
    return f"[{colour}]{ratio:.3f}x[/]"


def sameness(result: Result, plain: Result) -> str:
    reference = plain.warm_up.outputs
    same = result.num_same(reference)
    ok = same == len(reference)
    return f"[{'green' if ok else 'red'}]{'yes' if ok else 'no'}[/], {same} of " + str(
        len(reference)
    )


def losses(results: list[Result]) -> Iterator[str]:
    """A sentence for each method that is slower than one before it."""
    for earlier, later in combinations(results, 2):
        ours, theirs = later.tokens_per_second, earlier.tokens_per_second
        if ours < theirs:
            yield (
                f"{later.method} is slower than {earlier.method} here, by "
                f"{1 - ours / theirs:.1%} ({ours:.0f} against {theirs:.0f} tokens/s)."
            )


def report(results: list[Result], logs: Path) -> None:
    console.print(result_table(results))
    console.print(
        "* not measured: vLLM does not count its draft rows. This is what a padded "
        "drafter would have been fed in emssd's steps."
    )
    for sentence in losses(results):
        console.print(f"[red]{sentence}[/]")
    console.print(escape(provenance()), highlight=False, soft_wrap=True)
    console.print(f"Server logs: {logs}", highlight=False, soft_wrap=True)


def provenance() -> str:
    """What a reader needs to repeat the numbers, in one line."""
    command = shlex.join(["scripts/demo", *sys.argv[1:]])
    versions = [f"{name} {version(name)}" for name in ("vllm", "torch", "vllm-emssd")]
    if commit := git_commit():
        versions.append(f"commit {commit}")
    return "; ".join([machine(), ", ".join(versions), command])


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    loaded = ", ".join(path.name for path in preloads()) or "nothing"
    cpu = next(names, platform.machine())
    return f"{cpu}, {num_cpus()} CPUs, {loaded} preloaded"


def git_commit() -> str | None:
    if not (REPO / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def keep_serving(server: Server) -> None:
    request = {"model": SERVED_NAME, "prompt": "import ", "max_tokens": 64}
    url = f"{server.address}/v1/completions"
    console.print("The emssd server stays up until Ctrl-C. Try it:")
    print(
        f"curl -s {url} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(request))}"
    )
    server.process.wait()
    raise server.failure("the emssd server ended by itself")


def run(options: argparse.Namespace) -> int:
    prompts = read_prompts(options.prompts)
    logs = Path(tempfile.mkdtemp(prefix="emssd-demo-"))
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(
        *columns, TimeElapsedColumn(), console=console, refresh_per_second=2
    )
    results: list[Result] = []
    with ExitStack() as running:
        with progress:
            for method in methods(options):
                running.close()  # one server at a time: each has the whole machine
                bar = progress.add_task(
                    f"{method.name}: start", total=options.rounds * len(prompts)
                )

                def on_state(state: str, bar=bar, name=method.name) -> None:
                    progress.update(bar, description=f"{name}: {state}")

                def on_done(bar=bar) -> None:
                    progress.advance(bar)

                log = logs / f"{method.name}.log"
                server = running.enter_context(serving(method, options.model, log))
                results.append(
                    measure(server, method, prompts, options.rounds, on_state, on_done)
                )
                progress.update(bar, description=f"{method.name}: done")
                progress.stop_task(bar)
        if not options.keep:
            running.close()
        report(results, logs)
        reference = results[0].warm_up.outputs
        same = all(r.num_same(reference) == len(reference) for r in results)
        if options.keep:
            with suppress(KeyboardInterrupt):
                keep_serving(server)
    return 0 if same else 1


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
