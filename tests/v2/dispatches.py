"""Host work of steady drafting steps, under the interpreter.

Draft forwards are replayed as from graphs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
    scheduler_of,
    stop_counting_others,
)
from tests.v2 import interpreter
from tests.v2.host_work import REPLAY, SYNCHRONIZE, HostWork, counting
from tests.v2.padded_forwards import pad_forwards, replay_head
from tests.v2.runs import SteeredCosts

REPO = Path(__file__).resolve().parents[2]
K, COPY_LENGTH = 5, 7
DRAFT_MODELS = ("draft model", "larger draft model")
HEAD, AUTO = "head", "auto"
LAUNCHED, WITH_A_PROMPT = "launched", "with a prompt"
PROPOSERS = ("llma", "mixed", HEAD, *DRAFT_MODELS, AUTO)
COPYING_MODULES = (
    "pending_steps",
    "drafting_speculator",
    "speculator",
    "eagle_speculator",
    "copy_source",
)
BATCHES = (1, 24)  # requests
# Its end repeats, so that there is something to copy, until the answer departs from it.
REPEATING = "x = first(a, b)\ny = first(a, c)\nz = first(a, d)\nw = first(a"


def _wait_for(tensor: Any) -> None:
    from vllm_emssd.integration.v2.pending_steps import AsyncHostCopy

    AsyncHostCopy(tensor).wait()


# What waits for a tensor of the device, by what is noticed of it.
FAULTS: dict[str, Callable[[Any], object]] = {
    "item": lambda tensor: tensor[0].item(),
    "to": lambda tensor: tensor.to("cpu"),
    SYNCHRONIZE: _wait_for,
}


def grown(folder: Path) -> str:
    """The shipped drafter with 8 layers, not 2, and the same function."""
    script = [sys.executable, "-m", "models.make.grow_model", DRAFT, str(folder)]
    size = ["--hidden-size", "256", "--intermediate-size", "768", "--query-group", "4"]
    subprocess.run([*script, *size, "--num-layers", "8"], cwd=REPO, check=True)
    return str(folder)


@contextmanager
def recording_steps(
    llm: Any, num_reqs: int, replays: bool = True
) -> Iterator[list[dict[str, Any]]]:
    """Host work of `propose`, in the steps in which a request decodes."""
    speculator, steps = model_runner(llm).speculator, []
    propose = speculator.propose
    graphs: list[Any] = []
    if not replays:
        speculator.first_graphs = speculator.next_graphs = None
    elif speculator.has_head:
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
        decodes = input_batch.num_computed_tokens_np >= input_batch.prefill_len_np
        if decodes.any():
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
                    "has_prompt": not decodes.all(),
                }
            )
        return drafts

    speculator.propose = counted
    yield steps
    del speculator.propose


def decoding_steps(
    llm: Any, num_reqs: int, is_long: bool = False, replays: bool = True
) -> list[dict[str, Any]]:
    """Of requests that begin at once; of long ones every second repeats its prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=14)
    texts = [prompts()[i % len(prompts())][:60] for i in range(num_reqs)]
    if is_long:
        params.max_tokens = 30
        texts[::2] = [REPEATING] * len(texts[::2])
    with recording_steps(llm, num_reqs, replays) as steps:
        llm.generate(texts, params, use_tqdm=False)
    return [step for step in steps if not step["has_prompt"]]


def steps_with_a_prompt(llm: Any) -> list[dict[str, Any]]:
    """Of a decoding request, while the prompt of another is computed in pieces."""
    from vllm import SamplingParams

    scheduler_of(llm).scheduler_config.long_prefill_token_threshold = 16
    engine = llm.llm_engine
    with recording_steps(llm, 2) as steps:
        for text, max_tokens in ((REPEATING, 50), (prompts()[1][:200], 6)):
            params = SamplingParams(
                temperature=0, ignore_eos=True, max_tokens=max_tokens
            )
            engine.add_request(text[:20], text, params)
            for _ in range(5):  # past the first prompt
                engine.step()
        while engine.has_unfinished_requests():
            engine.step()
    return [step for step in steps if step["has_prompt"]]


def planted_steps(llm: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """With what a steady step must not do, by name."""
    from vllm_emssd.integration.v2.drafter import DeviceDrafter

    yield LAUNCHED, decoding_steps(llm, 1, replays=False)
    draft = DeviceDrafter.draft
    for name, fault in FAULTS.items():

        def faulty(self: Any, idx_mapping: Any, *args: Any, fault: Any = fault) -> None:
            fault(idx_mapping)
            draft(self, idx_mapping, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeviceDrafter, "draft", faulty)
            yield name, decoding_steps(llm, 1)


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


def run_all(slow: str = "") -> dict[str, list[dict[str, Any]]]:
    """With any argument what only slow tests look at."""
    seen: dict[str, list[dict[str, Any]]] = {}
    interpreter.schedule_asynchronously(True)
    small: dict[str, Any] = {"max_model_len": 128, "kv_cache_bytes": 64 << 20}
    small["options"] = {"block_size": 32, "async_scheduling": True}
    small["options"]["max_num_seqs"] = max(BATCHES)  # which vLLM warms up with
    methods = {"llma": LLMA, "mixed": MIXED, HEAD: EAGLE3, "draft model": DRAFT_MODEL}
    with TemporaryDirectory() as folder:
        if slow:
            larger = {"model": grown(Path(folder) / "m")}
            methods = {
                AUTO: DRAFT_MODEL | {"draft_length": "auto"},
                "draft model": DRAFT_MODEL,
                "larger draft model": DRAFT_MODEL | larger,
            }
        for name, method in methods.items():
            stop_counting_others()
            with running(EngineConfig(method, **small)) as llm, ExitStack() as stack:
                if name == AUTO:
                    stack.enter_context(SteeredCosts(llm)).draw()
                seen[name] = [
                    step
                    for num_reqs in BATCHES
                    for step in decoding_steps(llm, num_reqs, name in ("mixed", AUTO))
                ]
                if slow and name == "draft model":
                    seen |= planted_steps(llm)
                    seen[WITH_A_PROMPT] = steps_with_a_prompt(llm)
    return seen
