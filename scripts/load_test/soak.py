"""Keep a real server with emssd under mixed load for minutes or hours, and check it.

Plain vLLM answers greedy requests of all kinds first, in float32. Then a server with
emssd gets those, sampled ones, aborted ones and bad ones, all at once and at random,
with prefix caching and so small a cache that requests are preempted all the time.
Checked: every greedy answer, the form of others, that nothing is stuck, that the
counters agree, that memory does not grow, and that it ends when told to in mid-stream.
Writes a record, and exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from random import Random
from statistics import linear_regression
from typing import Any

import httpx
import openai
import psutil
from transformers import AutoTokenizer

from scripts.load_test import load
from vllm_emssd.bench import server_process as servers
from vllm_emssd.bench.provenance import provenance
from vllm_emssd.bench.report import write_result
from vllm_emssd.integration.cpu.settings import settings_here

REPO = Path(__file__).resolve().parents[2]
MODELS = REPO / "models"
REQUEST_SECONDS, DRAIN_SECONDS, STOP_SECONDS = 180, 15, 60  # longer is stuck
NUM_GREEDY, NEAR_TIE = 96, 1e-3  # in log probability: the batch's shape may decide
NUM_DRAFTS = 5  # of a request and step, at most
SHARES = {"greedy": 60, "sampled": 24, "abort": 12, "refuse": 4}  # of the requests
FLAGS = ["--served-model-name", load.TARGET, "--dtype", "float32", "--enforce-eager"]
FLAGS += ["--max-model-len", str(load.MAX_MODEL_LEN), "--max-num-seqs", "32"]
FLAGS += ["--max-num-batched-tokens", "256", "--host", "127.0.0.1"]
# Room for all, and log probabilities of what is sampled from: near ties show in them.
PLAIN = ["--kv-cache-memory-bytes", str(256 << 20)]
PLAIN += ["--logprobs-mode", "processed_logprobs"]
# A cache for one request of full length, and little more.
EMSSD = ["--kv-cache-memory-bytes", str(9 << 20), "--enable-prefix-caching"]
MAX_GROWTH = 2.0  # MiB a minute, over the later two thirds
LEAST_MINUTES_TO_JUDGE_MEMORY = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--model", default=str(MODELS / "target"))
    parser.add_argument("--draft-model", default=str(MODELS / "draft"))
    parser.add_argument("--llma", action="store_true", help="copy, no draft model")
    parser.add_argument("--out", type=Path, default=REPO / "docs/results/soak.json")
    return parser.parse_args()


def serving(
    name: str, model: str, logs: Path, flags: Sequence[str]
) -> AbstractContextManager[servers.ServerProcess]:
    """`vllm serve`, with the same threads and preloads for all."""
    port = servers.free_port()
    command = [servers.vllm_command(), "serve", model, *FLAGS, *flags]
    env = os.environ | settings_here(os.environ)
    env |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    command += ["--port", str(port)]
    return servers.server_process(name, command, port, logs / f"{name}.log", env)


def open_client(server: servers.ServerProcess) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)  # no proxy in between
    url = f"{server.base_url}/v1"
    return openai.AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, timeout=180, http_client=http
    )


async def plain_answers(
    server: servers.ServerProcess, prompts: Sequence[list[int]]
) -> list[load.Known]:
    """Of the requests whose answers no near tie decides."""
    async with open_client(server) as client:

        async def ask(kind: str, arguments: load.Arguments) -> load.Known | None:
            if await load.least_gap(client, arguments) <= NEAR_TIE:
                return None
            return load.Known(kind, arguments, await load.ask(client, arguments))

        requests = load.greedy_requests(prompts, NUM_GREEDY, Random(0))
        found = await asyncio.gather(*(ask(*request) for request in requests))
    return [known for known in found if known]


async def keep_asking(
    asker: load.Load, server: servers.ServerProcess, ends: float, rng: Random
) -> tuple[Counter[str], list[str]]:
    """Returns how many requests there were of each kind, and what was wrong."""
    asked: Counter[str] = Counter()
    wrong = []
    while time.monotonic() < ends and server.process.poll() is None:
        [kind] = rng.choices(list(SHARES), SHARES.values())
        asked[kind] += 1
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await getattr(asker, kind)(rng)
        except (load.WrongAnswerError, openai.APIError, OSError, ValueError) as error:
            wrong.append(f"{kind}: {error!r}"[:500])
            await asyncio.sleep(1)
        if rng.random() < 0.05:
            await asyncio.sleep(rng.random())  # load comes and goes
    return asked, wrong


async def watch_memory(pid: int, ends: float) -> list[tuple[float, float]]:
    """(minutes, MiB resident) of the server and all that it started."""
    samples, started = [], time.monotonic()
    while time.monotonic() < ends:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            tree = [process, *process.children(recursive=True)]
            resident = sum(one.memory_info().rss for one in tree)
            samples.append(((time.monotonic() - started) / 60, resident / 2**20))
        await asyncio.sleep(5)
    return samples


async def end_in_mid_stream(
    client: openai.AsyncOpenAI, server: servers.ServerProcess, prompt: list[int]
) -> list[str]:
    """SIGTERM while an answer is streamed: all ends, and soon. Returns what did not."""
    process = psutil.Process(server.process.pid)
    processes = [process, *process.children(recursive=True)]
    stream = await client.completions.create(
        model=load.TARGET, prompt=prompt, max_tokens=600, stream=True,
        extra_body={"ignore_eos": True},
        timeout=20,  # vLLM ends once its clients are gone
    )  # fmt: skip
    num_chunks = 0
    with suppress(openai.APIError, httpx.HTTPError):
        async with stream:
            async for _ in stream:
                num_chunks += 1
                if num_chunks == 5:
                    server.process.terminate()
    _, left = await asyncio.to_thread(psutil.wait_procs, processes, STOP_SECONDS)
    return [f"{STOP_SECONDS} s after SIGTERM there is {one}" for one in left]


def check_counters(
    metrics: dict[str, float], completion_tokens: int, cut_short: int
) -> list[str]:
    """What does not add up, given what the clients got."""
    ours = {
        name.removeprefix("vllm_emssd:num_").removesuffix("_total"): int(value)
        for name, value in metrics.items()
    }
    emitted, accepted = ours["emitted_tokens"], ours["accepted_tokens"]
    counted = metrics["vllm:spec_decode_num_accepted_tokens_total"]
    # vLLM leaves out what a step accepted for a request that was aborted meanwhile, as
    # it is where its front end finds a stop string.
    max_left_out = cut_short * NUM_DRAFTS
    holds = {
        "tokens are not the accepted and one a step": emitted
        == accepted + ours["request_steps"],
        f"accepted {accepted}, vLLM counts {counted}": counted
        in range(accepted - max_left_out, accepted + 1),
        "more drafts accepted than verified": accepted <= ours["draft_tokens"],
        "fewer tokens emitted than clients got": emitted >= completion_tokens,
        "proposals failed, see the log": not ours["failed_proposals"],
        "no draft was ever accepted": counted > 0,
        "requests are left running": not metrics["vllm:num_requests_running"],
        "requests are left waiting": not metrics["vllm:num_requests_waiting"],
        "blocks are left in use": not metrics["vllm:kv_cache_usage_perc"],
        "nothing was preempted": metrics["vllm:num_preemptions_total"] > 0,
    }
    return [what for what, is_so in holds.items() if not is_so]


def check_log(log: Path) -> list[str]:
    """The first errors that the server logged."""
    text = log.read_text(errors="replace")
    errors = re.findall(r"^.*\b(?:ERROR|Traceback)\b.*$", text, re.MULTILINE)
    return [f"log: {line[:300]}" for line in errors[:5]]


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """MiB a minute over the later two thirds, by least squares."""
    later = samples[len(samples) // 3 :]
    return linear_regression(*zip(*later, strict=True)).slope if later[2:] else 0.0


async def soak(
    server: servers.ServerProcess,
    known: Sequence[load.Known],
    prompts: Sequence[list[int]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """All of a server's life after its start. Returns the record."""
    ends, metrics = time.monotonic() + 60 * arguments.minutes, {}
    async with open_client(server) as client:
        asker = load.Load(client, known, prompts)
        askers = [
            keep_asking(asker, server, ends, Random(i))
            for i in range(arguments.concurrency)
        ]
        samples, *done = await asyncio.gather(
            watch_memory(server.process.pid, ends), *askers
        )
        wrong = check_log(server.log) + [one for _, found in done for one in found]
        if server.process.poll() is None:
            await asyncio.sleep(DRAIN_SECONDS)  # aborted requests take a step to go
            metrics = server.metrics()
            wrong += check_counters(metrics, asker.completion_tokens, asker.cut_short)
            wrong += await end_in_mid_stream(client, server, prompts[0])
        else:
            wrong.append(f"the server died with status {server.process.returncode}")
    judges_memory = arguments.minutes >= LEAST_MINUTES_TO_JUDGE_MEMORY
    if judges_memory and growth(samples) > MAX_GROWTH:
        wrong.append(f"memory grows by {growth(samples):.1f} MiB a minute")
    return {
        "is_clean": not wrong,
        "num_wrong": len(wrong),
        "wrong": wrong[:50],
        "minutes": arguments.minutes,
        "greedy_requests_known": len(known),
        "requests": dict(sum((asked for asked, _ in done), Counter())),
        "completion_tokens": asker.completion_tokens,
        "memory_growth_mib_a_minute": growth(samples),
        "memory_mib": samples[:: len(samples) // 20 + 1],  # (minutes, MiB)
        "counters": {
            name: int(value)
            for name, value in sorted(metrics.items())
            if name.startswith(("vllm_emssd:", "vllm:spec_", "vllm:num_preemptions"))
            and name.endswith("_total")
        },
    }


def main() -> int:
    arguments = parse_arguments()
    logs, model = Path(tempfile.mkdtemp(prefix="emssd-soak-")), arguments.model
    print(f"server logs: {logs}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (MODELS / "prompts.jsonl").read_text().splitlines()
    prompts = [tokenizer.encode(json.loads(line)["prompt"])[:700] for line in lines]
    with serving("plain", model, logs, PLAIN) as server:
        known = asyncio.run(plain_answers(server, prompts))
    config = {"method": "emssd", "num_speculative_tokens": NUM_DRAFTS}
    if not arguments.llma:
        config["model"] = arguments.draft_model
        config["draft_sample_method"] = "probabilistic"
    flags = [*EMSSD, "--speculative-config", json.dumps(config)]
    with serving("emssd", model, logs, flags) as server:
        record = asyncio.run(soak(server, known, prompts, arguments))
    write_result(arguments.out, {"provenance": provenance()} | record)
    print(arguments.out.read_text())
    return 0 if record["is_clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
