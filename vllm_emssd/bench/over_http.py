"""The same comparison over HTTP: `vllm serve` of each method, loaded by vLLM's own
`vllm bench serve`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from vllm_emssd.bench.comparison import ratios, spread
from vllm_emssd.bench.engine_process import (
    CPU_FIXES_SWITCH,
    EngineError,
    EngineOptions,
)
from vllm_emssd.bench.harness import Keep, Plan, Results, take_turns
from vllm_emssd.bench.methods import Method
from vllm_emssd.bench.request import Request, Tokenizer
from vllm_emssd.bench.server_process import (
    ServerProcess,
    free_port,
    server_process,
    vllm_command,
)

# Of `vllm bench serve`'s result.
LATENCIES = ("p50_ttft_ms", "p99_ttft_ms", "p50_itl_ms", "p99_itl_ms")
KEPT = ("duration", "completed", "total_output_tokens", "output_throughput", *LATENCIES)


def measure_over_http(
    plan: Plan,
    options: EngineOptions,
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    keep: Keep[dict[str, Any]] | None = None,
) -> Results[dict[str, Any]]:
    """Of each round, what `vllm bench serve` found. `keep`: see `take_turns`.

    Raises ValueError where it lacks what it reads prompts with.
    """
    if find_spec("pandas") is None:
        raise ValueError("vllm bench serve needs pandas: pip install pandas")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        @contextmanager
        def start(method: Method) -> Iterator[ServerProcess]:
            port, log = free_port(), folder / f"{method.name}.log"
            command = serve_command(method, options, port)
            fixes = {CPU_FIXES_SWITCH: "1"} if options.fix_cpu_sampling else {}
            environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"} | fixes
            with server_process(method.name, command, port, log, environment) as server:
                yield server

        def run(server: ServerProcess, method: Method, batch: int) -> dict[str, Any]:
            chosen = requests[: plan.num_requests(batch)]
            prompts = write_prompts(folder / "prompts.jsonl", chosen, tokenizer)
            result = folder / "result.json"
            result.unlink(missing_ok=True)
            args = options.engine_args
            command = load_command(server.base_url, args, chosen, prompts, batch)
            _run_load(
                [*command, "--result-dir", name, "--result-filename", result.name]
            )
            found = json.loads(result.read_text())
            if found["completed"] != len(chosen):
                raise EngineError(
                    f"{method.name}: {found['completed']} of {len(chosen)} requests "
                    f"completed; the server's log ends:\n{server.end_of_log(15)}"
                )
            return {key: found[key] for key in KEPT}

        return take_turns(plan, start, run, keep=keep)


def _run_load(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"vllm bench serve failed:\n{done.stderr[-2000:]}")


def serve_command(method: Method, options: EngineOptions, port: int) -> list[str]:
    """`vllm serve`, with what `vllm.LLM` would get."""
    args = dict(options.engine_args)
    command = [vllm_command(), "serve", args.pop("model"), "--port", str(port)]
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            command += [f"--{flag}", *map(str, value)]
        else:
            command += [f"--{flag}", str(value)]
    if method.speculative_config is not None:
        command += ["--speculative-config", json.dumps(method.speculative_config)]
    return command


def write_prompts(
    path: Path, requests: Sequence[Request], tokenizer: Tokenizer
) -> Path:
    """For `--dataset-name custom`, which wants text."""
    lines = [
        {
            "prompt": tokenizer.decode(request.prompt_token_ids),
            "output_tokens": request.max_tokens,
        }
        for request in requests
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def load_command(
    base_url: str,
    engine_args: dict[str, Any],
    requests: Sequence[Request],
    prompts: Path,
    max_concurrency: int,
) -> list[str]:
    """vLLM's load generator, greedy unless the requests say otherwise.

    Raises ValueError where requests sample differently: it has one setting for all.
    """
    sampling = requests[0].sampling
    if any(request.sampling != sampling for request in requests):
        raise ValueError(
            "over HTTP all requests sample alike; use a dataset without sampling "
            "parameters of its own, or 'vllm-emssd bench throughput'"
        )
    command = [vllm_command(), "bench", "serve", "--backend", "openai"]
    command += ["--base-url", base_url, "--endpoint", "/v1/completions"]
    command += [
        "--model",
        engine_args["model"],
        "--tokenizer",
        engine_args["tokenizer"],
    ]
    command += ["--dataset-name", "custom", "--dataset-path", str(prompts)]
    command += ["--skip-chat-template", "--disable-shuffle", "--custom-output-len=-1"]
    command += ["--num-prompts", str(len(requests)), "--ignore-eos", "--disable-tqdm"]
    command += ["--max-concurrency", str(max_concurrency), "--save-result"]
    command += ["--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99"]
    sent = {key: value for key, value in sampling.items() if key != "seed"}
    return command + [f"--{key.replace('_', '-')}={sent[key]}" for key in sent]


def summaries(results: Results[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by requests at once and method, and how many times as fast as another."""
    found = []
    for batch, by_method in results.items():
        seconds = {
            name: [1 / one["output_throughput"] for one in done]
            for name, done in by_method.items()
        }
        methods = {
            name: {"tokens_per_s": 1 / median(seconds[name])}
            | {"spread": spread(seconds[name]), "num_rounds": len(done)}
            | {key: median(one[key] for one in done) for key in KEPT}
            for name, done in by_method.items()
        }
        found.append({"batch": batch, "methods": methods, "ratios": ratios(seconds)})
    return found
