"""Engines of several processes, and several of one process, in a process of their own.

    python -m tests.regression.served_engines REPORT.json

The process loads no plugin and makes no config before it gets one from another process,
as with Ray Serve. The tests look at what this writes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tests.conftest  # noqa: F401  the environment of engines
from tests.engine import DRAFT, TARGET, prompts

SPECULATIVE = {"method": "emssd", "model": DRAFT, "proposer": "mixed"}
SPECULATIVE |= {"num_speculative_tokens": 3, "draft_length": "fixed"}
NAMES = ("num_steps", "num_draft_tokens", "num_emitted_tokens")
Series = dict[str, list[int]]  # model name -> values of NAMES


def options(name: str) -> dict[str, Any]:
    return {
        "model": TARGET,
        "served_model_name": name,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 16 << 20,
        "speculative_config": SPECULATIVE,
        "disable_log_stats": False,
    }


def pickled_config(name: str) -> bytes:
    from vllm.engine.arg_utils import EngineArgs

    return pickle.dumps(EngineArgs(**options(name)).create_engine_config())


def counters_dirs() -> list[str]:
    return sorted(p.name for p in Path(tempfile.gettempdir()).glob("vllm-emssd-*"))


def shown() -> Series:
    """Our counters on /metrics of this process."""
    from prometheus_client import generate_latest

    found: Series = {}
    text = generate_latest().decode()
    for name in NAMES:
        for model, value in re.findall(
            rf'vllm_emssd:{name}_total{{engine="0",model_name="(\w+)"}} (\S+)', text
        ):
            found.setdefault(model, []).append(int(float(value)))
    return found


def counted(engine: Any) -> list[int]:
    (counts,) = engine.collective_rpc("emssd_stats")
    return [counts[name] for name in NAMES]


def generate(engine: Any, num_tokens: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    engine.add_request("id", prompts()[0][:400], params)
    while engine.has_unfinished_requests():
        engine.step()


def processed(config: Any) -> dict[str, Any]:
    """What becomes of requests that need the hooks."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.v1.engine.input_processor import InputProcessor

    processor = InputProcessor(config)

    def process(**parameters: Any) -> Any:
        params = SamplingParams(**parameters)
        tokens = tokens_input([1, 2, 3])
        request = processor.process_inputs("0", tokens, params, ("generate",))
        return request.sampling_params.extra_args

    return {
        "text": process(extra_args={"emssd_reference": "def f():"}),
        "token_ids": processor.tokenizer.encode("def f():", add_special_tokens=False),
        "min_p": process(min_p=0.1),
        "logit_bias": process(logit_bias={3: 1.0}),
    }


def serve_another(name: str, num_tokens: int) -> tuple[Series, list[int]]:
    """An engine in a process that inherits this one's environment."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**options(name)))
    generate(engine, num_tokens)
    seen = shown(), counted(engine)
    del engine  # the pool ends its processes by a signal, which removes nothing
    gc.collect()
    return seen


def forked() -> Series:
    """What a forked process shows. Before it ends it does what ours does at exit."""
    from vllm_emssd.integration import metrics

    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, json.dumps(shown()).encode())
        for engine in metrics._collector.engines:
            metrics._forget(engine)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        series: Series = json.load(file)
    os.waitpid(child, 0)
    return series


@contextlib.contextmanager
def handed_down(config: Any) -> Iterator[None]:
    """A planted error: engines started here are given the directory of another."""
    from vllm_emssd.integration import metrics
    from vllm_emssd.integration.frontend.serving import tag_of

    tag = tag_of(config.speculative_config)
    assert tag is not None
    with pytest.MonkeyPatch.context() as patch:
        planted = SimpleNamespace(mkdtemp=lambda prefix: tag.counters_dir)
        patch.setattr(metrics, "tempfile", planted)
        yield


def main() -> None:
    report: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pickled = pool.apply(pickled_config, ("one",))
    report["left_by_maker"] = counters_dirs()
    config = pickle.loads(pickled)
    again = pickle.loads(pickled)
    report["processed"] = processed(config)
    gc.collect()

    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    def start(name: str) -> LLMEngine:
        args = EngineArgs(**options(name))
        return LLMEngine.from_engine_args(args, enable_multiprocessing=True)

    report["hashes"] = [config.compute_hash(), again.compute_hash()]
    executor = Executor.get_class(config)
    one = LLMEngine(config, executor, log_stats=True, multiprocess_mode=True)
    two = start("two")
    report["hashes"].append(config.compute_hash())
    report["at_start"] = shown()
    generate(one, 20)
    report["one_ran"] = shown(), [counted(one), counted(two)]
    generate(two, 12)
    report["both_ran"] = shown(), [counted(one), counted(two)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        report["other_process"] = pool.apply(serve_another, ("one", 5))
    report["forked"] = forked()
    report["after_others"] = shown()
    report["dirs"] = len(counters_dirs())
    two.engine_core.shutdown()
    del two
    gc.collect()
    report["two_ended"] = shown()
    restarted = start("two")
    report["restarted"] = shown()
    restarted.engine_core.shutdown()
    del restarted
    gc.collect()
    with handed_down(config):
        planted = start("two")
    generate(planted, 12)
    report["planted"] = shown(), [counted(one), counted(planted)]
    for engine in (one, planted):
        engine.engine_core.shutdown()
    Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
