"""The same comparison over HTTP: `vllm serve` of each method, loaded by vLLM's own
`vllm bench serve`, at rising concurrency."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from vllm_emssd.bench.comparison import ratios
from vllm_emssd.bench.engine_process import EngineError, EngineOptions
from vllm_emssd.bench.harness import Plan, in_turns, progress_bars, start_each
from vllm_emssd.bench.request import Request, Tokenizer
from vllm_emssd.bench.server import Server, serving
from vllm_emssd.bench.server_process import vllm_command

# Of `vllm bench serve`'s result.
LATENCIES = ("p50_ttft_ms", "p99_ttft_ms", "p50_itl_ms", "p99_itl_ms")
KEPT = ("duration", "completed", "total_output_tokens", "output_throughput", *LATENCIES)
SPEC_DECODE = "spec_decode_"

HttpRounds = dict[int, dict[str, list[dict[str, Any]]]]


def measure_over_http(
    plan: Plan,
    options: EngineOptions,
    requests: Sequence[Request],
    tokenizer: Tokenizer,
) -> HttpRounds:
    """All servers are up at once and take turns. Batch sizes are concurrencies.

    Raises ValueError where `vllm bench serve` lacks what it reads prompts with.
    """
    if find_spec("pandas") is None:
        raise ValueError("--http: vllm bench serve needs pandas: pip install pandas")
    rounds: HttpRounds = {}
    with (
        progress_bars() as progress,
        tempfile.TemporaryDirectory() as name,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(name)
        servers = start_each(
            "servers",
            plan.methods,
            lambda method: serving(method, options, folder),
            progress,
            stack,
        )
        bar = progress.add_task("rounds", total=plan.num_turns())
        for concurrency in plan.batches:
            progress.update(bar, description=f"concurrency {concurrency}")
            chosen = requests[: plan.num_requests(concurrency)]
            prompts = write_prompts(folder / "prompts.jsonl", chosen, tokenizer)
            runs = [
                (s.method, partial(_load, s, options, chosen, prompts, concurrency))
                for s in servers
            ]
            rounds[concurrency] = in_turns(plan, runs, lambda: progress.advance(bar))
    return rounds


def write_prompts(
    path: Path, requests: Sequence[Request], tokenizer: Tokenizer
) -> Path:
    """For `--dataset-name custom`, which wants text."""
    with path.open("w") as file:
        for request in requests:
            line = {
                "prompt": tokenizer.decode(request.prompt_token_ids),
                "output_tokens": request.max_tokens,
            }
            file.write(json.dumps(line) + "\n")
    return path


def load_command(
    server: Server,
    options: EngineOptions,
    requests: Sequence[Request],
    prompts: Path,
    concurrency: int,
    result: Path,
) -> list[str]:
    """vLLM's load generator, greedy unless the requests say otherwise.

    Raises ValueError where requests sample differently: it has one setting for all.
    """
    sampling = requests[0].sampling
    if any(request.sampling != sampling for request in requests):
        raise ValueError(
            "over HTTP all requests sample alike; use a workload without sampling "
            "parameters of its own, or leave --http away"
        )
    command = [vllm_command(), "bench", "serve", "--backend", "openai"]
    command += ["--base-url", server.base_url, "--endpoint", "/v1/completions"]
    command += ["--model", options.model, "--tokenizer", options.tokenizer]
    command += ["--dataset-name", "custom", "--dataset-path", str(prompts)]
    command += ["--skip-chat-template", "--disable-shuffle", "--custom-output-len=-1"]
    command += ["--num-prompts", str(len(requests)), "--ignore-eos", "--disable-tqdm"]
    command += ["--max-concurrency", str(concurrency)]
    command += ["--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99"]
    command += ["--save-result", "--result-dir", str(result.parent)]
    command += ["--result-filename", result.name]
    sent = {key: value for key, value in sampling.items() if key != "seed"}
    for key, value in sent.items():
        command.append(f"--{key.replace('_', '-')}={value}")
    return command


def _load(
    server: Server,
    options: EngineOptions,
    requests: Sequence[Request],
    prompts: Path,
    concurrency: int,
) -> dict[str, Any]:
    result = prompts.with_name("result.json")
    result.unlink(missing_ok=True)
    done = subprocess.run(
        load_command(server, options, requests, prompts, concurrency, result),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not result.exists():
        raise EngineError(f"vllm bench serve failed:\n{done.stderr[-2000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != len(requests):
        raise EngineError(
            f"{server.method.name}: {found['completed']} of {len(requests)} requests "
            f"completed; the server's log ends:\n{server.log.read_text()[-2000:]}"
        )
    return {
        key: value
        for key, value in found.items()
        if key in KEPT or key.startswith(SPEC_DECODE)
    }


def summaries(rounds: HttpRounds) -> list[dict[str, Any]]:
    """Medians by concurrency and method, and how many times as fast as another."""
    return [
        {
            "concurrency": concurrency,
            "methods": {
                name: {key: median(one[key] for one in done) for key in KEPT}
                | {"num_rounds": len(done)}
                for name, done in by_method.items()
            },
            "ratios": ratios(
                {
                    name: [1 / one["output_throughput"] for one in done]
                    for name, done in by_method.items()
                }
            ),
        }
        for concurrency, by_method in rounds.items()
    ]
