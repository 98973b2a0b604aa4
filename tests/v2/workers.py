"""An EAGLE-3 head on one worker and on two, under the interpreter."""

from __future__ import annotations

from typing import Any

from tests.engine import EngineConfig, greedy, running, stop_counting_others
from tests.v2 import interpreter
from tests.v2.heads import HEAD
from tests.v2.runs import SMALL, texts


def run_all() -> dict[str, Any]:
    interpreter.schedule_asynchronously(False)
    seen: dict[str, Any] = {}
    for name, drafts, num_workers in (("plain", None, 1), ("head", HEAD, 2)):
        stop_counting_others()
        options = SMALL["options"] | {"tensor_parallel_size": num_workers}
        with running(EngineConfig(drafts, **SMALL | {"options": options})) as llm:
            seen[name] = {"token_ids": greedy(llm, texts(), max_tokens=18)}
            if drafts:
                seen[name]["counts"] = llm.collective_rpc("emssd_stats")
    return seen
