#!/usr/bin/env python3
"""Time speculative methods against each other, side by side.

    scripts/compare_methods.py --make-pair   # 63M target, its first fifth drafts
    scripts/compare_methods.py --model models/target --draft-model models/draft

Each engine lives in a process of its own and they take turns, so that whatever else the
machine does falls on all. Prints medians, their ratio, the saving that the rows saved
times the drafter's measured cost of a row predicts, and how the time of a proposal
splits; writes everything to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

REPO = Path(__file__).resolve().parent.parent
SIDES = ("plain", "stock", "emssd")
CONTEXT = 1024
AUTO_TOKENS = 8


@dataclass
class Timing:
    """One round of one side: seconds, and (rows, ms) of each model forward."""

    seconds: float = 0.0
    num_tokens: int = 0
    num_accepted_tokens: int = 0
    propose_ms: float = 0.0
    logits_ms: float = 0.0
    draft_forwards: list[tuple[int, float]] = field(default_factory=list)
    target_forwards: list[tuple[int, float]] = field(default_factory=list)

    @property
    def draft_rows(self) -> int:
        return sum(rows for rows, _ in self.draft_forwards)

    @property
    def target_rows(self) -> int:
        return sum(rows for rows, _ in self.target_forwards)

    @property
    def draft_ms(self) -> float:
        return sum(ms for _, ms in self.draft_forwards)


# ---------------------------------------------------------------- one side


class Stopwatch:
    """Times the models' forwards and the proposal of one engine, by hooks."""

    def __init__(self, runner: Any) -> None:
        self.timing = Timing()
        self._time_forwards(runner.model, "target_forwards")
        if hasattr(getattr(runner, "drafter", None), "model"):
            self._time_forwards(runner.drafter.model, "draft_forwards")
            runner.drafter.model.compute_logits = self._timed(
                runner.drafter.model.compute_logits, "logits_ms"
            )
            runner.propose_draft_token_ids = self._timed(
                runner.propose_draft_token_ids, "propose_ms"
            )

    def _time_forwards(self, model: Any, into: str) -> None:
        started = []

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            started.append(time.perf_counter())

        def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            ms = (time.perf_counter() - started.pop()) * 1e3
            rows = int(kwargs["input_ids"].shape[0])
            getattr(self.timing, into).append((rows, ms))

        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after, with_kwargs=True)

    def _timed(self, function: Any, into: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                ms = (time.perf_counter() - start) * 1e3
                setattr(self.timing, into, getattr(self.timing, into) + ms)

        return timed


def speculative_config(side: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """plain, stock, emssd (fixed), auto, llma, llma-auto; kN: fixed with N drafts."""
    stock = {
        "method": "draft_model",
        "model": str(args.draft_model),
        "num_speculative_tokens": args.num_speculative_tokens,
    }
    fixed = stock | {"method": "emssd", "draft_length": "fixed"}
    auto = {"draft_length": "auto", "num_speculative_tokens": AUTO_TOKENS}
    known = {
        "plain": None,
        "stock": stock,
        "emssd": fixed,
        "auto": fixed | auto,
        "llma": {"method": "emssd", "draft_length": "fixed"},
        "llma-auto": {"method": "emssd", "draft_length": "auto"},
    }
    if side in known:
        return known[side]
    return fixed | {"num_speculative_tokens": int(side.removeprefix("k"))}


def serve_side(side: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Child process: build the engine, then run a batch whenever asked."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(args.model),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=max(args.batches),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=args.kv_cache_mib << 20,
        speculative_config=speculative_config(side, args),
        disable_log_stats=False,
        tokenizer=str(args.tokenizer or args.model),
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    stopwatch = Stopwatch(runner)
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)

    def accepted() -> int:
        name = "vllm:spec_decode_num_accepted_tokens"
        return sum(m.value for m in llm.get_metrics() if m.name == name)

    pipe.send("ready")
    while (prompts := pipe.recv()) is not None:
        stopwatch.timing = timing = Timing()
        before, start = accepted(), time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        timing.seconds = time.perf_counter() - start
        timing.num_tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
        timing.num_accepted_tokens = accepted() - before
        pipe.send(timing)


# ---------------------------------------------------------------- a pair to time


def make_pair(folder: Path, tokenizer: Path) -> tuple[Path, Path]:
    """A 63M-parameter Llama with random weights and, as drafter, its first fifth.

    The later layers add little, so that the two often agree, as a real pair does.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=768,
        num_hidden_layers=10,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        max_position_embeddings=2048,
    )
    target = LlamaForCausalLM(config)
    for layer in target.model.layers[2:]:
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            output.weight.data *= 0.25
    config.num_hidden_layers = 2
    draft = LlamaForCausalLM(config)
    draft.load_state_dict(target.state_dict(), strict=False)
    for name, model in (("target", target), ("draft", draft)):
        model.config.num_hidden_layers = len(model.model.layers)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / name)
    return folder / "target", folder / "draft"


# ---------------------------------------------------------------- the comparison


def row_cost(forwards: list[tuple[int, float]], most_rows: int) -> tuple[float, float]:
    """Least-squares line through the median ms of each row count: (fixed, per row)."""
    by_rows: dict[int, list[float]] = {}
    for rows, ms in forwards:
        if rows <= most_rows:
            by_rows.setdefault(rows, []).append(ms)
    points = [
        (rows, median(times)) for rows, times in by_rows.items() if len(times) > 2
    ]
    slope, fixed = np.polyfit(*zip(*points, strict=True), 1)
    return float(fixed), float(slope)


def compare(batch: int, rounds: dict[str, list[Timing]], k: int) -> dict[str, Any]:
    """One batch size: speeds of all sides, and stock against emssd where both ran."""
    seconds = {side: median(t.seconds for t in ts) for side, ts in rounds.items()}
    result: dict[str, Any] = {
        "batch": batch,
        "tokens_per_s": {s: rounds[s][0].num_tokens / seconds[s] for s in rounds},
        "accepted": {
            s: median(t.num_accepted_tokens for t in rounds[s]) for s in rounds
        },
        "draft_rows": {s: median(t.draft_rows for t in rounds[s]) for s in rounds},
        "target_rows": {s: median(t.target_rows for t in rounds[s]) for s in rounds},
        "target_forwards": {
            s: median(len(t.target_forwards) for t in rounds[s]) for s in rounds
        },
    }
    if "stock" in rounds and "emssd" in rounds:
        result |= saving(batch, rounds, seconds, k)
    return result


def saving(
    batch: int, rounds: dict[str, list[Timing]], seconds: dict[str, float], k: int
) -> dict[str, Any]:
    """What the rows saved should earn, what they did, and what bookkeeping costs."""
    most_rows = batch * (k + 2)
    draft = [f for s in ("stock", "emssd") for t in rounds[s] for f in t.draft_forwards]
    target = [f for ts in rounds.values() for t in ts for f in t.target_forwards]
    _, draft_row_ms = row_cost(draft, most_rows)
    _, target_row_ms = row_cost(target, most_rows)
    rows_saved = rounds["stock"][0].draft_rows - rounds["emssd"][0].draft_rows
    predicted = rows_saved * draft_row_ms / 1e3
    saved = seconds["stock"] - seconds["emssd"]
    ours = rounds["emssd"]
    model_ms = [t.draft_ms + t.logits_ms for t in ours]
    own_ms = [t.propose_ms - model for t, model in zip(ours, model_ms, strict=True)]
    return {
        "emssd_over_stock": seconds["stock"] / seconds["emssd"],
        "draft_row_ms": draft_row_ms,
        "target_row_ms": target_row_ms,
        "row_cost_ratio": draft_row_ms / target_row_ms,
        "predicted_saving_s": predicted,
        "saving_s": saved,
        "saving_over_predicted": saved / predicted,
        "model_forwards_ms": median(model_ms),
        "bookkeeping_ms": median(own_ms),
        "bookkeeping_over_forwards": median(own_ms) / median(model_ms),
    }


def print_results(results: list[dict[str, Any]]) -> None:
    sides = list(results[0]["tokens_per_s"])
    speeds = Table(title="tokens/s, medians of alternating rounds (x plain)")
    for column in ("batch", *sides):
        speeds.add_column(column, justify="right")
    for r in results:
        speed = r["tokens_per_s"]
        base = speed.get("plain", next(iter(speed.values())))
        speeds.add_row(
            str(r["batch"]), *(f"{speed[s]:.0f} ({speed[s] / base:.2f})" for s in sides)
        )
    Console(width=150).print(speeds)
    if "emssd_over_stock" not in results[0]:
        return
    table = Table(title="emssd (fixed) against vLLM's draft_model")
    for column in (
        "batch", "emssd / stock", "draft rows stock", "emssd", "row cost draft/target",
        "saving / predicted", "bookkeeping / forwards",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            str(r["batch"]),
            f"{r['emssd_over_stock']:.3f}",
            f"{r['draft_rows']['stock']:.0f}",
            f"{r['draft_rows']['emssd']:.0f}",
            f"{r['row_cost_ratio']:.3f}",
            f"{r['saving_over_predicted']:.2f}",
            f"{r['bookkeeping_over_forwards']:.2f}",
        )
    Console(width=150).print(table)


def read_prompts(path: Path, count: int) -> list[str]:
    lines = path.read_text().splitlines()
    texts = [json.loads(line)["prompt"][:400] for line in lines]
    return (texts * (count // len(texts) + 1))[:count]


def measure(args: argparse.Namespace) -> dict[int, dict[str, list[Timing]]]:
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in args.sides:
        pipes[side], child = context.Pipe()
        context.Process(
            target=serve_side, args=(side, args, child), daemon=True
        ).start()
        assert pipes[side].recv() == "ready"
    timings: dict[int, dict[str, list[Timing]]] = {}
    with Progress() as progress:
        bar = progress.add_task("rounds", total=len(args.batches) * (args.rounds + 1))
        for batch in args.batches:
            prompts = read_prompts(args.prompts, batch)
            timings[batch] = {side: [] for side in args.sides}
            for i in range(args.rounds + 1):  # the first one warms up
                for side in args.sides if i % 2 else reversed(args.sides):
                    pipes[side].send(prompts)
                    timing = pipes[side].recv()
                    if i:
                        timings[batch][side].append(timing)
                    time.sleep(0.3)  # until the other side's threads stop spinning
                progress.advance(bar)
    for pipe in pipes.values():
        pipe.send(None)
    return timings


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=REPO / "models/target")
    parser.add_argument("--draft-model", type=Path, default=REPO / "models/draft")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--prompts", type=Path, default=REPO / "models/prompts.jsonl")
    parser.add_argument("--make-pair", action="store_true")
    parser.add_argument("--sides", nargs="+", default=list(SIDES))
    parser.add_argument("--kv-cache-mib", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def provenance() -> dict[str, Any]:
    import torch
    import vllm

    import vllm_emssd

    commit = subprocess.run(
        ["git", "-C", str(REPO), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "command": " ".join(sys.argv),
        "commit": commit.stdout.strip(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "vllm_emssd": vllm_emssd.__version__,
        "machine": f"{(models or [platform.machine()])[0]}, {os.cpu_count()} cores",
        "environment": {
            name: os.environ.get(name)
            for name in ("LD_PRELOAD", "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
        },
    }


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.make_pair:
            tokenizer = args.tokenizer or args.model
            args.model, args.draft_model = make_pair(Path(folder), tokenizer)
        timings = measure(args)
    k = args.num_speculative_tokens
    results = [compare(batch, rounds, k) for batch, rounds in timings.items()]
    print_results(results)
    if args.output:
        rounds = {
            batch: {side: [asdict(t) for t in ts] for side, ts in sides.items()}
            for batch, sides in timings.items()
        }
        for sides in rounds.values():
            for ts in sides.values():
                for t in ts:  # thousands of forwards a round: the sums are enough
                    t["draft_forwards"] = len(t["draft_forwards"])
                    t["target_forwards"] = len(t["target_forwards"])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps(
                {"provenance": provenance(), "results": results, "rounds": rounds},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
