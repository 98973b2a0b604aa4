"""One engine in a process tree of its own: `python -m tests.distributed.job IN OUT`.

Reads a `Job` from IN (JSON), serves its prompts, writes a `Report` to OUT. Then, if the
job says so, serves them again, and has something happen to the engine in mid-run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.processes import listeners

ENOUGH_TOKENS = 5  # of one request, before anything happens to the engine
LONG = 400  # tokens, not reached then


@dataclasses.dataclass
class Job:
    """What to serve, and how."""

    engine: dict[str, Any]  # AsyncEngineArgs
    num_prompts: int = 8
    max_tokens: int = 320  # more than 64 steps
    incident: str | None = None  # "kill" the last rank, or let it "disagree"


@dataclasses.dataclass
class Report:
    """What came of it."""

    token_ids: list[list[int]] = dataclasses.field(default_factory=list)
    gaps: list[list[float]] = dataclasses.field(default_factory=list)  # logprob, top 2
    stats: list[dict[str, int]] = dataclasses.field(default_factory=list)  # by rank
    engine_stats: list[dict[str, int]] = dataclasses.field(default_factory=list)
    costs: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # by rank
    errors: list[str] = dataclasses.field(default_factory=list)  # by request
    seconds_to_error: float = 0.0
    # Process ID and TCP port of each.
    listeners: list[Sequence[int]] = dataclasses.field(default_factory=list)


async def serve(job: Job) -> Report:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from tests.engine import prompts

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**job.engine))
    texts = prompts()[: job.num_prompts]
    try:
        this = psutil.Process()
        own = {this.pid, *(child.pid for child in this.children(recursive=True))}
        own_listeners = [entry for entry in listeners() if entry[0] in own]
        if job.engine["speculative_config"].get("draft_length") == "auto":
            await engine.collective_rpc("measure_otherwise")
        requests = _Requests(engine, texts, job.max_tokens)
        report = await _report(engine, job, await asyncio.gather(*requests.tasks))
        report.listeners = own_listeners
        if job.incident:
            await _have_incident(engine, job.incident, texts, report)
        return report
    finally:
        engine.shutdown()


class _Requests:
    """All prompts at once, greedily."""

    def __init__(self, engine: Any, texts: Sequence[str], max_tokens: int) -> None:
        self.under_way = asyncio.Event()
        self._engine, self._max_tokens = engine, max_tokens
        self.tasks = [asyncio.create_task(self._one(text)) for text in texts]

    async def _one(self, text: str) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=self._max_tokens, ignore_eos=True, logprobs=2
        )
        async for output in self._engine.generate(text, params, uuid.uuid4().hex):
            if len(output.outputs[0].token_ids) >= ENOUGH_TOKENS:
                self.under_way.set()
        return output.outputs[0]


async def _have_incident(
    engine: Any, incident: str, texts: Sequence[str], report: Report
) -> None:
    process_ids = await engine.collective_rpc("process_id")
    requests = _Requests(engine, texts, LONG)
    await requests.under_way.wait()
    happened = time.monotonic()
    if incident == "kill":
        os.kill(process_ids[-1], signal.SIGKILL)
    else:
        await engine.collective_rpc(incident)
    outcomes = await asyncio.gather(*requests.tasks, return_exceptions=True)
    report.errors = [repr(o) for o in outcomes if isinstance(o, BaseException)]
    report.seconds_to_error = time.monotonic() - happened


async def _report(engine: Any, job: Job, completions: list[Any]) -> Report:
    from vllm_emssd.integration.frontend.serving import tag_of
    from vllm_emssd.metrics import read_shared_counters

    options = job.engine["speculative_config"]
    is_auto = options.get("draft_length") == "auto"
    tag = tag_of(engine.vllm_config.speculative_config)
    shared = read_shared_counters(Path(tag.counters_dir))
    return Report(
        token_ids=[list(c.token_ids) for c in completions],
        gaps=[[_gap(position) for position in c.logprobs] for c in completions],
        stats=await engine.collective_rpc("emssd_stats"),
        engine_stats=[counts for _, counts in shared],
        costs=await engine.collective_rpc("costs") if is_auto else [],
    )


def _gap(position: dict[int, Any]) -> float:
    """Between the two likeliest tokens."""
    first, second = sorted((p.logprob for p in position.values()), reverse=True)[:2]
    return first - second


def main() -> None:
    spec, result = map(Path, sys.argv[1:])
    job = Job(**json.loads(spec.read_text()))
    report = asyncio.run(serve(job))
    result.write_text(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    main()
