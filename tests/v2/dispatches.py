"""Host work of steady drafting steps, under the interpreter.

Draft forwards are replayed as from graphs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.engine import (
    DRAFT,
    DRAFT_MODEL,
    LLMA,
    EngineConfig,
    model_runner,
    prompts,
    running,
    stop_counting_others,
)
from tests.v2 import interpreter
from tests.v2.host_work import REPLAY, HostWork, counting
from tests.v2.padded_forwards import pad_forwards

REPO = Path(__file__).resolve().parents[2]
LAYERS = (2, 8)  # of the drafter
COPIES = 0  # layers where there is none
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

    from vllm_emssd.integration.v2 import pending_steps

    speculator, steps = model_runner(llm).speculator, []
    propose = speculator.propose
    graphs = pad_forwards(speculator) if speculator.has_draft_model else []

    def counted(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        work = HostWork()
        for graph in graphs:
            replay = type(graph).run_fullgraph.__get__(graph)
            graph.run_fullgraph = work.counts_as_one(replay, REPLAY)
        with counting(work), pytest.MonkeyPatch.context() as patch:
            # It does not wait for what it copies.
            copy = work.counts_as_one(pending_steps.async_copy_to_np, "copy to host")
            patch.setattr(pending_steps, "async_copy_to_np", copy)
            drafts = propose(input_batch, *args, **kwargs)
        is_steady = input_batch.num_draft_tokens == num_reqs * K
        if not speculator.has_draft_model:
            num_computed = input_batch.num_computed_tokens_np
            is_steady = (num_computed >= input_batch.prefill_len_np).all()
        if is_steady:
            steps.append(work)
        return drafts

    speculator.propose = counted
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=14)
    texts = [prompts()[i % len(prompts())][:60] for i in range(num_reqs)]
    llm.generate(texts, params, use_tqdm=False)
    del speculator.propose
    return steps


def run_all() -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    interpreter.schedule_asynchronously(True)
    with TemporaryDirectory() as folder:
        for num_layers in (COPIES, *LAYERS):
            method = LLMA
            if num_layers != COPIES:
                draft = (
                    DRAFT if num_layers == 2 else grown(num_layers, Path(folder) / "m")
                )
                method = DRAFT_MODEL | {"model": draft}
            small: dict[str, Any] = {"max_model_len": 128, "kv_cache_bytes": 64 << 20}
            options = {"block_size": 32, "async_scheduling": True}
            config = EngineConfig(method, options=options, **small)
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
    return seen
