"""Host work of steady drafting steps, under the interpreter.

Draft forwards are replayed as from graphs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.engine import (
    DRAFT,
    DRAFT_MODEL,
    EAGLE3,
    LLMA,
    MIXED,
    EngineConfig,
    model_runner,
    prompts,
    running,
    stop_counting_others,
)
from tests.v2 import interpreter
from tests.v2.host_work import REPLAY, HostWork, counting
from tests.v2.padded_forwards import pad_forwards, replay_head

REPO = Path(__file__).resolve().parents[2]
K, COPY_LENGTH = 5, 7
LAYERS = {"draft model": 2, "larger draft model": 8}
HEAD = "head"
PROPOSERS = ("llma", "mixed", HEAD, *LAYERS)
COPYING_MODULES = (
    "pending_steps",
    "drafting_speculator",
    "speculator",
    "eagle_speculator",
    "mixed_speculator",
    "copy_source",
)
BATCHES = (1, 24)  # requests
# Its end repeats, so that there is something to copy, until the answer departs from it.
REPEATING = "x = first(a, b)\ny = first(a, c)\nz = first(a, d)\nw = first(a"


def grown(num_layers: int, folder: Path) -> str:
    """The shipped drafter with more layers, and the same function."""
    script = [sys.executable, "-m", "models.make.grow_model", DRAFT, str(folder)]
    size = ["--hidden-size", "256", "--intermediate-size", "768", "--query-group", "4"]
    subprocess.run(
        [*script, *size, "--num-layers", str(num_layers)], cwd=REPO, check=True
    )
    return str(folder)


def decoding_steps(llm: Any, num_reqs: int, is_mixed: bool) -> list[dict[str, Any]]:
    """Host work of `propose`, in the steps in which all requests decode."""
    from vllm import SamplingParams

    speculator, steps = model_runner(llm).speculator, []
    propose = speculator.propose
    graphs: list[Any] = []
    if speculator.has_head:
        graphs = replay_head(speculator)
    elif speculator.has_draft_model:
        graphs = pad_forwards(speculator)

    def counted(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        work = HostWork()
        forwards = speculator.counters.num_draft_forwards
        for graph in graphs:
            replay = type(graph).run_fullgraph.__get__(graph)
            graph.run_fullgraph = work.counts_as_one(replay, REPLAY)
        with counting(work), copies_waiting_for_nothing(work):
            drafts = propose(input_batch, *args, **kwargs)
        forwards = speculator.counters.num_draft_forwards - forwards
        if (input_batch.num_computed_tokens_np >= input_batch.prefill_len_np).all():
            num_replayed = work.calls[REPLAY]
            if speculator.has_head and num_replayed == 2:  # all drafts but the first
                num_replayed = K
            num_launched = forwards - num_replayed  # to feed what is missing
            steps.append(
                {
                    "requests": num_reqs,
                    "calls": dict(work.calls),
                    "total": work.total,
                    "waits": work.waits,
                    "backfills": num_launched > 0,
                    "verifies": input_batch.num_draft_tokens,
                    "made": list(speculator.draft_lens.values()),
                }
            )
        return drafts

    speculator.propose = counted
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=14)
    texts = [prompts()[i % len(prompts())][:60] for i in range(num_reqs)]
    if is_mixed:
        params.max_tokens = 30
        texts[::2] = [REPEATING] * len(texts[::2])
    llm.generate(texts, params, use_tqdm=False)
    del speculator.propose
    return steps


@contextmanager
def copies_waiting_for_nothing(work: HostWork) -> Iterator[None]:
    """Between host and device; each counts as one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in COPYING_MODULES:
            loaded = import_module(f"vllm_emssd.integration.v2.{module}")
            for name in ("async_copy_to_np", "async_tensor_h2d"):
                if copy := getattr(loaded, name, None):
                    patch.setattr(loaded, name, work.counts_as_one(copy, name))
        yield


def run_all() -> dict[str, list[dict[str, Any]]]:
    seen: dict[str, list[dict[str, Any]]] = {}
    interpreter.schedule_asynchronously(True)
    small: dict[str, Any] = {"max_model_len": 128, "kv_cache_bytes": 64 << 20}
    small["options"] = {"block_size": 32, "async_scheduling": True}
    small["options"]["max_num_seqs"] = max(BATCHES)  # which vLLM warms up with
    with TemporaryDirectory() as folder:
        methods = {
            "llma": LLMA,
            "mixed": MIXED,
            HEAD: EAGLE3,
            "draft model": DRAFT_MODEL,
            "larger draft model": DRAFT_MODEL
            | {"model": grown(LAYERS["larger draft model"], Path(folder) / "m")},
        }
        for name, method in methods.items():
            stop_counting_others()
            with running(EngineConfig(method, **small)) as llm:
                seen[name] = [
                    step
                    for num_reqs in BATCHES
                    for step in decoding_steps(llm, num_reqs, name == "mixed")
                ]
    return seen
