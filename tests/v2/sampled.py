"""Samples of copies beside a model's drafts, under the interpreter; and with errors."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import MIXED, EngineConfig, model_runner, running
from tests.lossless.test_sampled import SAMPLED_DRAFTS, draw
from tests.v2.runs import SMALL, SpiedSources

CONFIG = EngineConfig(
    MIXED | SAMPLED_DRAFTS,
    **SMALL | {"prefix_caching": True, "max_model_len": 512},
)
TEMPERATURE = 0.8
MANY, FEW = 300, 160  # samples; few show a fault
FAULTS = ("uncertain copies", "drafts of another distribution")


def plant(fault: str, llm: Any, patch: pytest.MonkeyPatch) -> None:
    """What the rejection sampler takes copies or drafts for is not what they are."""
    from vllm_emssd.integration.v2 import mixed_speculator

    if fault == "uncertain copies":
        patch.setattr(mixed_speculator, "make_certain", lambda *args: None)
        return
    speculator = model_runner(llm).speculator
    draft = speculator._drafter.draft

    def flat(*args: Any) -> None:
        draft(*args)
        speculator.draft_logits.zero_()

    patch.setattr(speculator._drafter, "draft", flat)


def run_all() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with running(CONFIG) as llm:
        with SpiedSources(llm) as sources:
            seen["right"] = draw(llm, MANY, temperature=TEMPERATURE).token_ids
        seen["accepted"] = sources["accepted"]
        for fault in FAULTS:
            with pytest.MonkeyPatch.context() as patch:
                plant(fault, llm, patch)
                seen[fault] = draw(llm, FEW, temperature=TEMPERATURE).token_ids
    return seen
