"""Draft lengths of a V2 engine changed while it runs, under the interpreter."""

from __future__ import annotations

from typing import Any

from tests.engine import EngineConfig, running
from tests.v2 import interpreter
from tests.v2.runs import AUTO, EMSSD, SMALL, K, SteeredCosts, asynchronous, one_pass

LENGTHS = (1, 0, K, None)


def error_of(llm: Any, num_draft_tokens: int) -> str:
    try:
        llm.collective_rpc("emssd_fix_draft_length", args=(num_draft_tokens,))
    except ValueError as error:
        return str(error)
    return ""


def run_all() -> dict[str, Any]:
    """By free drafts, of which automatic lengths make the most."""
    interpreter.schedule_asynchronously(True)
    seen: dict[str, Any] = {}
    config = EngineConfig(EMSSD | AUTO, **asynchronous(SMALL))
    with running(config) as llm, SteeredCosts(llm) as steered:
        for length in LENGTHS:
            llm.collective_rpc("emssd_fix_draft_length", args=(length,))
            steered.lengths = []
            seen[str(length)] = one_pass(llm) | {"lengths": steered.lengths}
        seen["error"] = error_of(llm, K + 1)
    return seen
