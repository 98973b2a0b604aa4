#!/usr/bin/env python3
"""Time emssd with fixed lengths against vLLM's draft_model, side by side.

    scripts/bench_against_stock.py --make-pair   # 63M target, its first fifth drafts
    scripts/bench_against_stock.py --model models/target --draft-model models/draft

Both engines live in processes of their own and take turns, so that whatever else the
machine does falls on both. Prints medians, their ratio, the saving that the rows saved
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
    def draft_ms(self) -> float:
        return sum(ms for _, ms in self.draft_forwards)


# ---------------------------------------------------------------- one side


class Stopwatch:
    """Times the models' forwards and the proposal of one engine, by hooks."""

    def __init__(self, runner: Any) -> None:
        self.timing = Timing()
        self._time_forwards(runner.model, "target_forwards")
        if hasattr(runner, "drafter"):
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


def serve_side(side: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Child process: build the engine, then run a batch whenever asked."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    stock = {
        "method": "draft_model",
        "model": str(args.draft_model),
        "num_speculative_tokens": args.num_speculative_tokens,
    }
    speculative = {
        "plain": None,
        "stock": stock,
        "emssd": stock | {"method": "emssd", "draft_length": "fixed"},
    }
    llm = LLM(
        str(args.model),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=max(args.batches),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 30,
        speculative_config=speculative[side],
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
    seconds = {side: median(t.seconds for t in rounds[side]) for side in SIDES}
    most_rows = batch * (k + 2)
    draft = [f for s in ("stock", "emssd") for t in rounds[s] for f in t.draft_forwards]
    target = [f for s in SIDES for t in rounds[s] for f in t.target_forwards]
    _, draft_row_ms = row_cost(draft, most_rows)
    _, target_row_ms = row_cost(target, most_rows)
    stock, ours = rounds["stock"][0], rounds["emssd"][0]
    predicted = (stock.draft_rows - ours.draft_rows) * draft_row_ms / 1e3
    saved = seconds["stock"] - seconds["emssd"]
    own = [t.propose_ms - t.draft_ms - t.logits_ms for t in rounds["emssd"]]
    return {
        "batch": batch,
        "tokens_per_s": {s: rounds[s][0].num_tokens / seconds[s] for s in SIDES},
        "emssd_over_stock": seconds["stock"] / seconds["emssd"],
        "emssd_over_plain": seconds["plain"] / seconds["emssd"],
        "accepted": {s: rounds[s][0].num_accepted_tokens for s in ("stock", "emssd")},
        "draft_rows": {s: rounds[s][0].draft_rows for s in ("stock", "emssd")},
        "draft_row_ms": draft_row_ms,
        "target_row_ms": target_row_ms,
        "row_cost_ratio": draft_row_ms / target_row_ms,
        "predicted_saving_s": predicted,
        "saving_s": saved,
        "saving_over_predicted": saved / predicted,
        "draft_forward_ms": median(t.draft_ms for t in rounds["emssd"]),
        "draft_logits_ms": median(t.logits_ms for t in rounds["emssd"]),
        "bookkeeping_ms": median(own),
        "bookkeeping_over_forwards": median(
            o / (t.draft_ms + t.logits_ms)
            for o, t in zip(own, rounds["emssd"], strict=True)
        ),
    }


def print_results(results: list[dict[str, Any]]) -> None:
    table = Table(title="emssd (fixed) against vLLM's draft_model, medians")
    for column in (
        "batch", "plain tok/s", "stock tok/s", "emssd tok/s", "emssd / stock",
        "emssd / plain", "rows stock", "rows emssd", "row cost draft/target",
        "saving / predicted", "bookkeeping / forwards",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            str(r["batch"]),
            *(f"{r['tokens_per_s'][side]:.0f}" for side in SIDES),
            f"{r['emssd_over_stock']:.3f}",
            f"{r['emssd_over_plain']:.3f}",
            str(r["draft_rows"]["stock"]),
            str(r["draft_rows"]["emssd"]),
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
    for side in SIDES:
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
            timings[batch] = {side: [] for side in SIDES}
            for i in range(args.rounds + 1):  # the first one warms up
                for side in SIDES if i % 2 else reversed(SIDES):
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
