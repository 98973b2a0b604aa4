#!/usr/bin/env python3
"""Keep a real server with emssd under mixed load for minutes or hours, and check it.

Plain vLLM answers a catalogue of greedy requests first, in float32. Then a server with
emssd gets those, sampled ones, aborted ones and bad ones, all at once and at random,
with prefix caching and so small a cache that requests are preempted all the time.
Checked: every greedy answer, what others look like, that nothing is stuck, that the
counters agree, that memory does not grow, and that it ends when told to in mid-stream.
Writes a record, and exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import numpy as np
import openai
import psutil
from random_adapter import RANK, make_adapter
from soak_load import (
    MAX_MODEL_LEN,
    NEAR_TIE,
    TARGET,
    Answer,
    Client,
    GreedyRequest,
    Tally,
    WrongAnswerError,
    least_gap,
    make_greedy_requests,
)
from transformers import AutoTokenizer

from vllm_emssd.bench.methods import Method
from vllm_emssd.bench.provenance import commit, processor
from vllm_emssd.bench.server_process import (
    ServerProcess,
    free_port,
    server_process,
    vllm_command,
)
from vllm_emssd.integration.cpu.settings import find_preloads, num_cpus

REPO = Path(__file__).resolve().parent.parent
START_SECONDS, REQUEST_SECONDS = 180, 180

FLAGS = shlex.split(
    "--served-model-name target --dtype float32 --enforce-eager --host 127.0.0.1 "
    f"--max-model-len {MAX_MODEL_LEN} --max-num-seqs 32 --max-num-batched-tokens 256"
)
# For the plain side: room for all, and log probabilities of what is sampled from, in
# which a near tie shows.
ROOMY = ["--kv-cache-memory-bytes", str(256 << 20)]
ROOMY += ["--logprobs-mode", "processed_logprobs"]
ADAPTERS = ("adapter-0", "adapter-1")
SMALL_CACHE = 9 << 20  # one request of full length, and little more
SAMPLE_SECONDS = 5
DRAIN_SECONDS = 60
STOP_SECONDS = 60
LEAST_MINUTES_TO_JUDGE_MEMORY = 10
MOST_GROWTH = 2.0  # MiB a minute, over the later two thirds
RECORDED = (
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_hits_total",
)
KINDS = {"greedy": 60, "sampled": 20, "grammar": 4, "abort": 12, "refuse": 4}


def serving(
    method: Method, model: str, log: Path, flags: Sequence[str]
) -> AbstractContextManager[ServerProcess]:
    """`vllm serve` of one method, with the same threads and preloads for all."""
    port = free_port()
    command = [vllm_command(), "serve", model, *flags, "--port", str(port)]
    if method.speculative_config:
        command += ["--speculative-config", json.dumps(method.speculative_config)]
    env = os.environ | {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(num_cpus()),
        "LD_PRELOAD": ":".join(map(str, find_preloads())),
    }
    return server_process(method.name, command, port, log, env, START_SECONDS)


def open_client(server: ServerProcess) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.base_url}/v1",
        api_key="none",
        max_retries=0,
        timeout=REQUEST_SECONDS,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    )


def describe_machine() -> str:
    loaded = ", ".join(path.name for path in find_preloads()) or "nothing"
    return f"{processor()}, {num_cpus()} CPUs, {loaded} preloaded"


@dataclass(frozen=True, slots=True)
class Load:
    requests: list[GreedyRequest]
    answers: list[Answer]
    prompts: list[list[int]]
    num_near_ties: int


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=__doc__.splitlines()[0]
    )
    models, add = REPO / "models", parser.add_argument
    add("--minutes", type=float, default=60)
    add("--model", default=str(models / "target"))
    add("--draft-model", default=str(models / "draft"))
    add(
        "--lora",
        action="store_true",
        help="all requests go to two LoRA adapters with random weights, none to the "
        "target itself: in one batch with an adapter, vLLM 0.32 on a CPU gives the "
        "target's own requests the adapter's weights, with or without speculation",
    )
    add("--llma", action="store_true", help="copy from the text, without draft model")
    add("--prompts", default=str(models / "prompts.jsonl"))
    add("--num-speculative-tokens", type=int, default=5)
    add("--requests", type=int, default=96, help="greedy ones in the catalogue")
    add("--concurrency", type=int, default=16)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=REPO / "docs" / "results" / "soak.json")
    options = parser.parse_args()
    if options.minutes <= 0 or options.concurrency < 1 or options.requests < 8:
        parser.error("--minutes > 0, --concurrency >= 1 and --requests >= 8 are needed")
    return options


def emssd(options: argparse.Namespace) -> Method:
    asked: dict[str, Any] = {
        "method": "emssd",
        "num_speculative_tokens": options.num_speculative_tokens,
    }
    if not options.llma:
        asked |= {"model": options.draft_model, "draft_sample_method": "probabilistic"}
    return Method("emssd", asked)


async def plain_answers(
    server: ServerProcess, requests: Sequence[GreedyRequest]
) -> tuple[list[Answer], list[float]]:
    """Of each request: plain vLLM's answer, and its nearest tie."""
    gate = asyncio.Semaphore(8)
    async with open_client(server) as client:
        asker = Client(client, Tally())

        async def one(request: GreedyRequest) -> tuple[Answer, float]:
            async with gate:
                answer = await asker.answer(request, streams=False)
                return answer, await least_gap(client, request)

        both = await asyncio.gather(*map(one, requests))
    return [answer for answer, _ in both], [gap for _, gap in both]


def prepare(options: argparse.Namespace, logs: Path) -> Load:
    """The catalogue, answered by plain vLLM with a roomy cache."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lines = Path(options.prompts).read_text().splitlines()
    prompts = [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]
    rng = random.Random(options.seed)
    if options.lora:
        for seed, name in enumerate(ADAPTERS):
            make_adapter(options.model, logs / name, seed)
    requests = make_greedy_requests(
        prompts, options.requests, rng, models_asked(options)
    )
    plain, log = Method("plain", None), logs / "plain.log"
    flags = FLAGS + ROOMY + lora_flags(options, logs)
    with serving(plain, options.model, log, flags) as server:
        answers, gaps = asyncio.run(plain_answers(server, requests))
    sure = [i for i, gap in enumerate(gaps) if gap > NEAR_TIE]
    return Load(
        [requests[i] for i in sure],
        [answers[i] for i in sure],
        [prompt[:600] for prompt in prompts],
        len(requests) - len(sure),
    )


def models_asked(options: argparse.Namespace) -> Sequence[str]:
    return ADAPTERS if options.lora else (TARGET,)


def lora_flags(options: argparse.Namespace, folder: Path) -> list[str]:
    """For a server with the adapters in the folder."""
    if not options.lora:
        return []
    modules = [f"{name}={folder / name}" for name in ADAPTERS]
    flags = ["--enable-lora", "--max-loras", str(len(ADAPTERS))]
    return [*flags, "--max-lora-rank", str(RANK), "--lora-modules", *modules]


class Soak:
    """One server under load."""

    def __init__(
        self, options: argparse.Namespace, load: Load, server: ServerProcess
    ) -> None:
        self._load, self._server = load, server
        self._concurrency = options.concurrency
        self._models = models_asked(options)
        self._rng = random.Random(options.seed + 1)
        self._ends = time.monotonic() + 60 * options.minutes
        self.tally = Tally()
        self.memory: list[tuple[float, dict[str, float]]] = []  # minutes, MiB

    async def run(self) -> None:
        async with open_client(self._server) as client:
            asker = Client(client, self.tally, self._models)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch_memory())
                for _ in range(self._concurrency):
                    tasks.create_task(self._keep_asking(asker))
            await self._drain()

    async def _keep_asking(self, client: Client) -> None:
        rng = random.Random(self._rng.random())
        while time.monotonic() < self._ends and not self._is_dead():
            [kind] = rng.choices(list(KINDS), KINDS.values())
            started = time.monotonic()
            try:
                await self._ask(client, kind, rng)
            except WrongAnswerError as error:
                self.tally.wrong.append(str(error)[:500])
            except (openai.APIError, TimeoutError, ValueError) as error:
                self.tally.wrong.append(f"{kind}: {error!r}"[:500])
                await asyncio.sleep(1)
            self.tally.requests[kind] += 1
            self.tally.seconds.append(time.monotonic() - started)
            if rng.random() < 0.05:
                await asyncio.sleep(rng.random())  # load comes and goes

    async def _ask(self, client: Client, kind: str, rng: random.Random) -> None:
        prompt = rng.choice(self._load.prompts)
        if kind == "greedy":
            i = rng.randrange(len(self._load.requests))
            await client.check_greedy(
                self._load.requests[i], self._load.answers[i], rng.random() < 0.5
            )
        elif kind == "sampled":
            await client.check_sampled(prompt, rng)
        elif kind == "grammar":
            await client.check_sampled_grammar(prompt)
        elif kind == "abort":
            await client.abort(prompt, rng)
        else:
            await client.refuse(prompt, rng)

    def _is_dead(self) -> bool:
        return self._server.process.poll() is not None

    async def _watch_memory(self) -> None:
        started = time.monotonic()
        while time.monotonic() < self._ends and not self._is_dead():
            minutes = (time.monotonic() - started) / 60
            self.memory.append((minutes, resident_mib(self._server.process.pid)))
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _drain(self) -> None:
        """Aborted requests may take a step or two to go."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and not self._is_dead():
            metrics = await asyncio.to_thread(self._server.metrics)
            if not metrics["vllm:num_requests_running"]:
                return
            await asyncio.sleep(0.5)


def resident_mib(pid: int) -> dict[str, float]:
    """Of a process and of all that it started, by name."""
    found: Counter[str] = Counter()
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                found[one.name()] += one.memory_info().rss
    return {name: resident / 2**20 for name, resident in found.items()}


def check_counters(
    metrics: dict[str, float], tally: Tally, num_spec_tokens: int
) -> list[str]:
    """What does not add up."""

    def ours(name: str) -> int:
        return int(metrics[f"vllm_emssd:{name}_total"])

    accepted = int(metrics["vllm:spec_decode_num_accepted_tokens_total"])
    wrong = []
    if ours("num_emitted_tokens") != (
        ours("num_accepted_tokens") + ours("num_request_steps")
    ):
        wrong.append("tokens emitted are not accepted ones and one a request and step")
    # vLLM leaves out what a step accepted for a request that was aborted meanwhile, as
    # it is where its front end finds a stop string.
    left_out = ours("num_accepted_tokens") - accepted
    if not 0 <= left_out <= tally.cut_short * num_spec_tokens:
        wrong.append(f"accepted {ours('num_accepted_tokens')}, vLLM counts {accepted}")
    if ours("num_accepted_tokens") > ours("num_draft_tokens"):
        wrong.append("more drafts accepted than verified")
    if ours("num_emitted_tokens") < tally.completion_tokens:
        wrong.append("fewer tokens emitted than clients got")
    if ours("num_failed_proposals"):
        wrong.append(f"{ours('num_failed_proposals')} proposals failed, see the log")
    if not accepted:
        wrong.append("no draft was ever accepted")
    for name in ("num_requests_running", "num_requests_waiting"):
        if metrics[f"vllm:{name}"]:
            wrong.append(f"{name} is {metrics[f'vllm:{name}']:.0f} after the load")
    if metrics["vllm:kv_cache_usage_perc"]:
        wrong.append("blocks are in use after the load")
    if not metrics["vllm:num_preemptions_total"]:
        wrong.append("nothing was preempted: the cache is too large for this load")
    return wrong


def check_log(log: Path) -> list[str]:
    """Errors that the server logged."""
    text = log.read_text(errors="replace")
    errors = re.findall(r"^.*\b(?:ERROR|Traceback)\b.*$", text, re.MULTILINE)
    return [f"log: {line[:300]}" for line in errors[:5]]


def growth(memory: Sequence[tuple[float, dict[str, float]]]) -> float:
    """MiB a minute of all processes over the later two thirds, by least squares."""
    later = [(at, sum(sizes.values())) for at, sizes in memory[len(memory) // 3 :]]
    return float(np.polyfit(*zip(*later, strict=True), 1)[0]) if len(later) > 2 else 0.0


def thinned(
    memory: Sequence[tuple[float, dict[str, float]]], most: int = 20
) -> list[dict[str, float]]:
    """Of all the samples at most so many and the last, for the record."""
    step = -(-len(memory) // most)
    kept = [*memory[:-1:step], memory[-1]]
    return [
        {"minutes": round(at, 1)} | {name: round(mib) for name, mib in sizes.items()}
        for at, sizes in kept
    ]


def end_in_mid_stream(server: ServerProcess, prompt: list[int]) -> list[str]:
    """SIGTERM while answers are being streamed: all ends, and soon."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    body = {"model": "target", "prompt": prompt, "max_tokens": 600, "stream": True}
    body |= {"ignore_eos": True}
    num_chunks = 0
    with (
        suppress(httpx.HTTPError),
        httpx.stream(
            "POST",
            f"{server.base_url}/v1/completions",
            json=body,
            timeout=STOP_SECONDS,
            trust_env=False,
        ) as stream,
    ):
        for _ in stream.iter_lines():
            num_chunks += 1
            if num_chunks == 5:
                server.process.terminate()
    wrong = []
    if num_chunks < 5:
        wrong.append(f"the last stream had {num_chunks} lines only")
    try:
        server.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        wrong.append(f"the server was still there {STOP_SECONDS} s after SIGTERM")
    _, left = psutil.wait_procs(children, timeout=10)
    return wrong + [f"left behind: {process.name()}" for process in left]


def soak_server(
    options: argparse.Namespace, load: Load, log: Path
) -> tuple[Soak, dict[str, float], list[str]]:
    """All of one server's life. Returns what happened, its last metrics, and what was
    wrong."""
    flags = [*FLAGS, "--enable-prefix-caching"]
    flags += ["--kv-cache-memory-bytes", str(SMALL_CACHE)]
    flags += lora_flags(options, log.parent)
    with serving(emssd(options), options.model, log, flags) as server:
        soak = Soak(options, load, server)
        asyncio.run(soak.run())
        wrong = soak.tally.wrong + check_log(log)
        if server.process.poll() is not None:
            wrong.append(f"the server died with status {server.process.returncode}")
            return soak, {}, wrong
        metrics = server.metrics()
        wrong += check_counters(metrics, soak.tally, options.num_speculative_tokens)
        wrong += end_in_mid_stream(server, load.prompts[0])
    return soak, metrics, wrong


def describe_soak(soak: Soak, metrics: dict[str, float]) -> dict[str, Any]:
    """Counts, times and memory, for the record."""
    tally, seconds = soak.tally, sorted(soak.tally.seconds)
    return {
        "requests": dict(tally.requests),
        "cut_short": tally.cut_short,
        "completion_tokens": tally.completion_tokens,
        "seconds": {
            "median": median(seconds),
            "p99": quantiles(seconds, n=100)[-1] if len(seconds) > 1 else seconds[0],
            "most": seconds[-1],
        },
        "memory_mib": {
            "growth_a_minute": growth(soak.memory),
            "samples": thinned(soak.memory),
        },
        "counters": {
            name: int(value)
            for name, value in sorted(metrics.items())
            if name.startswith("vllm_emssd:") or name in RECORDED
        },
    }


def run(options: argparse.Namespace) -> int:
    logs = Path(tempfile.mkdtemp(prefix="emssd-soak-"))
    print(f"server logs: {logs}", flush=True)
    load = prepare(options, logs)
    print(f"{len(load.requests)} greedy requests have an answer", flush=True)
    log = logs / "emssd.log"
    started = time.monotonic()
    soak, metrics, wrong = soak_server(options, load, log)
    judges_memory = options.minutes >= LEAST_MINUTES_TO_JUDGE_MEMORY
    if judges_memory and (rise := growth(soak.memory)) > MOST_GROWTH:
        wrong.append(f"memory grows by {rise:.1f} MiB a minute")
    found = describe_soak(soak, metrics)
    found["memory_mib"]["is_judged"] = judges_memory
    record = {
        "command": shlex.join(["scripts/soak", *sys.argv[1:]]),
        "commit": commit(REPO) or "unknown",
        "versions": {n: version(n) for n in ("vllm", "torch", "vllm-emssd")},
        "machine": describe_machine(),
        "minutes": (time.monotonic() - started) / 60,
        "is_clean": not wrong,
        "wrong": wrong[:50],
        "num_wrong": len(wrong),
        "greedy_requests_known": len(load.requests),
        "near_ties_left_out": load.num_near_ties,
        **found,
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    print(f"{'clean' if not wrong else 'NOT CLEAN'}: {options.out}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(run(parse_options()))
