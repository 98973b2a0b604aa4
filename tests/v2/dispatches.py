"""Host work of steady drafting steps, under the interpreter.

    python -m tests.v2.dispatches RESULTS.json

In a process of its own: see `runs.py`. Draft forwards are replayed as from graphs.
"""

from __future__ import annotations

from tests.v2 import interpreter

if __name__ == "__main__":
    interpreter.install()

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.engine import (
    DRAFT,
    DRAFT_MODEL,
    EngineConfig,
    model_runner,
    prompts,
    running,
    stop_counting_others,
)
from tests.v2.host_work import REPLAY, HostWork, counting
from tests.v2.padded_forwards import pad_forwards

REPO = Path(__file__).resolve().parents[2]
LAYERS = (2, 8)  # of the drafter
BATCHES = (1, 24)  # requests
K = 5


def grown(num_layers: int, folder: Path) -> str:
    """The shipped drafter with more layers, and the same function."""
    script = [sys.executable, "-m", "models.make.grow_model", DRAFT, str(folder)]
    size = ["--hidden-size", "256", "--intermediate-size", "768", "--query-group", "4"]
    subprocess.run(
        [*script, *size, "--num-layers", str(num_layers)], cwd=REPO, check=True
    )
    return str(folder)


def steady_steps(llm: Any, num_reqs: int) -> list[HostWork]:
    """Of `propose`, in the steps in which all requests decode."""
    from vllm import SamplingParams

    speculator, steps = model_runner(llm).speculator, []
    propose = speculator.propose
    graphs = pad_forwards(speculator)

    def counted(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        work = HostWork()
        for graph in graphs:
            replay = type(graph).run_fullgraph.__get__(graph)
            graph.run_fullgraph = work.counts_as_one(replay, REPLAY)
        with counting(work):
            drafts = propose(input_batch, *args, **kwargs)
        if input_batch.num_draft_tokens == num_reqs * K:
            steps.append(work)
        return drafts

    speculator.propose = counted
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=14)
    texts = [prompts()[i % len(prompts())][:60] for i in range(num_reqs)]
    llm.generate(texts, params, use_tqdm=False)
    del speculator.propose
    return steps


def run_all(path: Path) -> None:
    import vllm_emssd.integration.cpu.worker  # noqa: F401  before vLLM's V2 runner

    seen: list[dict[str, Any]] = []
    interpreter.schedule_asynchronously(True)
    with TemporaryDirectory() as folder:
        for num_layers in LAYERS:
            draft = DRAFT if num_layers == 2 else grown(num_layers, Path(folder) / "m")
            small: dict[str, Any] = {"max_model_len": 128, "kv_cache_bytes": 64 << 20}
            options = {"block_size": 32, "async_scheduling": True}
            config = EngineConfig(
                DRAFT_MODEL | {"model": draft}, options=options, **small
            )
            stop_counting_others()
            with running(config) as llm:
                for num_reqs in BATCHES:
                    for work in steady_steps(llm, num_reqs):
                        seen.append(
                            {
                                "layers": num_layers,
                                "requests": num_reqs,
                                "calls": dict(work.calls),
                                "total": work.total,
                                "waits": work.waits,
                            }
                        )
    path.write_text(json.dumps(seen))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
