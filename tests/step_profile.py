"""CPU time of the parts of a step on the V1 runner, and the operators each calls.

    python -m tests.step_profile                     # emssd, 8 drafts
    python -m tests.step_profile --method plain      # or stock: what to compare with
    python -m tests.step_profile --functions 30      # and the slowest Python functions

It is the engine thread's own CPU time: other processes are not counted, though they
take caches and memory bandwidth. Of each part the tenth percentile over the steps in
which all requests decode is printed, the least of the repeats.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import tests.conftest  # noqa: F401
from vllm_emssd.bench.workloads import SHIPPED_MODELS

PARTS = ("target", "draft_models", "propose", "step")


class PartTimes:
    """CPU milliseconds of the parts of each step, by what is called for them."""

    def __init__(self, llm: Any) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: defaultdict[str, float] = defaultdict(float)
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._time(runner.model, "forward", "target")
        self._time(runner.model, "compute_logits", "target")
        if hasattr(runner, "drafter"):
            self._time(runner.drafter.model, "forward", "draft_models")
            self._time(runner.drafter.model, "compute_logits", "draft_models")
            self._time(runner, "propose_draft_token_ids", "propose")
        engine = llm.llm_engine
        step = engine.step

        def timed_step() -> Any:
            self._now.clear()
            start = time.thread_time()
            outputs = step()
            self._now["step"] = (time.thread_time() - start) * 1e3
            self.steps.append(dict(self._now))
            return outputs

        engine.step = timed_step

    def _time(self, owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._now[part] += (time.thread_time() - start) * 1e3

        setattr(owner, name, timed)

    def summary(self) -> dict[str, float]:
        """Tenth percentiles; `drafting` is all of it but the models, `around` is what
        is neither drafting nor the target."""
        columns = {
            part: np.array([step.get(part, 0.0) for step in self.steps])
            for part in PARTS
        }
        columns["drafting"] = columns["propose"] - columns["draft_models"]
        columns["around"] = columns["step"] - columns["propose"] - columns["target"]
        return {
            part: float(np.percentile(times, 10)) for part, times in columns.items()
        }


def make_engine(args: argparse.Namespace) -> Any:
    from vllm import LLM

    config: dict[str, Any] | None = {
        "method": "emssd",
        "model": str(SHIPPED_MODELS / "draft"),
        "num_speculative_tokens": args.num_drafts,
        "draft_length": args.draft_length,
    }
    if args.method == "stock":
        del config["draft_length"]
        config["method"] = "draft_model"
    return LLM(
        str(args.target),
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=max(args.requests),
        kv_cache_memory_bytes=512 << 20,
        speculative_config=None if args.method == "plain" else config,
        enforce_eager=args.enforce_eager,
        enable_prefix_caching=False,
        seed=0,
    )


def run_steps(llm: Any, num_requests: int, num_steps: int) -> Iterator[None]:
    """One request a prompt; yields while all decode, after each step, then aborts."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    prompts = [
        {
            "prompt_token_ids": [
                int(t) for t in np.random.default_rng(i).integers(8, 2000, 64)
            ]
        }
        for i in range(num_requests)
    ]
    params = SamplingParams(max_tokens=900, ignore_eos=True, temperature=0.0)
    run_steps.count += 1
    names = [f"{run_steps.count}-{i}" for i in range(num_requests)]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, prompt, params)
    for _ in range(5):
        engine.step()
    for _ in range(num_steps):
        engine.step()
        yield
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()


run_steps.count = 0  # type: ignore[attr-defined]


def all_steps(llm: Any, num_requests: int, num_steps: int) -> None:
    for _ in run_steps(llm, num_requests, num_steps):
        pass


@contextmanager
def operators(counts: Counter[str]) -> Iterator[None]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield
    for event in profiler.events():
        if event.cpu_parent is None or event.cpu_parent.name.startswith("emssd"):
            counts[event.name] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--method", default="emssd", choices=("emssd", "plain", "stock")
    )
    parser.add_argument("--target", default=SHIPPED_MODELS / "target")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 24])
    parser.add_argument("--num-drafts", type=int, default=8)
    parser.add_argument("--draft-length", default="fixed", choices=("fixed", "auto"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--functions", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    llm = make_engine(args)
    times = PartTimes(llm)
    print(f"{args.method}, K = {args.num_drafts}: ms of CPU time a step")
    for num_requests in args.requests:
        all_steps(llm, num_requests, 10)
        repeats = []
        for _ in range(args.repeats):
            steps = run_steps(llm, num_requests, args.steps)
            for _ in range(5):
                next(steps)
            times.steps.clear()
            for _ in range(args.steps - 6):
                next(steps)
            repeats.append(times.summary())
            for _ in steps:
                pass
        least = {part: min(r[part] for r in repeats) for part in repeats[0]}
        counts: Counter[str] = Counter()
        with operators(counts):
            all_steps(llm, num_requests, 20)
        row = ", ".join(f"{part} {ms:.2f}" for part, ms in least.items())
        num_operators = sum(counts.values()) // 25  # a step
        print(f"{num_requests:3d} requests: {row}; operators {num_operators}")
        if args.functions:
            print([(n, c // 25) for n, c in counts.most_common(25)])
            profiler = cProfile.Profile(time.thread_time)
            profiler.runcall(all_steps, llm, num_requests, 60)
            stats = pstats.Stats(profiler)
            stats.sort_stats("tottime").print_stats(args.functions)
            stats.sort_stats("cumtime").print_stats(args.functions)


if __name__ == "__main__":
    main()
