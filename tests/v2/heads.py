"""Runs of an EAGLE-3 head on the V2 runner, under the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import (
    EAGLE3,
    STOCK_EAGLE3,
    EngineConfig,
    model_runner,
)
from tests.planted_failures import break_parts
from tests.v2.runs import (
    AUTO,
    CACHED,
    COPY,
    SMALL,
    TIGHT,
    TRIM,
    K,
    PausedLengths,
    RaggedLengths,
    asynchronous,
    automatic,
    mixing,
    one_pass,
    pass_with,
    run_engines,
    sessions,
    structured,
)
from vllm_emssd.draft_length import DraftLengthPolicy, FixedDraftLength

HEAD = EAGLE3 | {"num_speculative_tokens": K}
STOCK_HEAD = STOCK_EAGLE3 | {"num_speculative_tokens": K}
LONGER = 50  # tokens, of each request
BOTH = HEAD | {"proposer": "mixed", "copy_length": COPY}


class LateLengths(DraftLengthPolicy):
    """No drafts in the first steps, K in the others."""

    def __init__(self, num_idle: int) -> None:
        self._num_idle = num_idle

    def skips_step(self, num_sampling: int) -> bool:
        self._num_idle -= 1
        return self._num_idle >= 0


class SpiedDrafts:
    """Drafts by the text that they follow."""

    def __init__(self, llm: Any) -> None:
        self._speculator = model_runner(llm).speculator

    def __enter__(self) -> dict[tuple[int, ...], list[int]]:
        propose, by_text = self._speculator.propose, {}

        def spied(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            drafts = propose(input_batch, *args, **kwargs)
            states = self._speculator._req_states
            made = self._speculator.draft_lens.values()
            slots = input_batch.idx_mapping.tolist()
            for row, (slot, num_made) in enumerate(zip(slots, made, strict=True)):
                length = states.total_len.gpu[slot]
                text = tuple(states.all_token_ids.gpu[slot, :length].tolist())
                if num_made:
                    by_text[text] = drafts[row, :num_made].tolist()
            return drafts

        self._speculator.propose = spied
        return by_text

    def __exit__(self, *error: Any) -> None:
        del self._speculator.propose


class SpiedSlots:
    """Whether hidden states are kept under the KV slots of their own tokens, in steps
    in which others made several drafts."""

    def __init__(self, llm: Any) -> None:
        self._speculator = model_runner(llm).speculator

    def __enter__(self) -> list[bool]:
        speculator, are_own = self._speculator, []
        propose, run_head = speculator.propose, speculator._run_head
        keep = speculator._kept.keep
        own, depth = torch.empty(0), 0

        def proposed(
            batch: Any, metadata: Any, slots: Any, *args: Any, **kw: Any
        ) -> Any:
            nonlocal own, depth
            own, depth = slots[speculator._layer].clone(), 0
            return propose(batch, metadata, slots, *args, **kw)

        def ran(input_batch: Any, num_drafts: int) -> Any:
            nonlocal depth
            depth = num_drafts
            return run_head(input_batch, num_drafts)

        def kept(states: Any, kv_slots: Any, row: int) -> None:
            if depth > 1:
                are_own.append(torch.equal(kv_slots, own[: len(kv_slots)]))
            keep(states, kv_slots, row)

        speculator.propose, speculator._run_head = proposed, ran
        speculator._kept.keep = kept
        return are_own

    def __exit__(self, *error: Any) -> None:
        del self._speculator.propose, self._speculator._run_head
        del self._speculator._kept.keep


def compared(llm: Any, lengths: DraftLengthPolicy, steady: Any) -> dict[str, Any]:
    """How many drafts are those of a head that never paused, after the same text."""
    with SpiedDrafts(llm) as drafts:
        run = pass_with(llm, lengths)
    pairs = [(made, steady[text]) for text, made in drafts.items() if text in steady]
    same = [all(a == b for a, b in zip(*pair, strict=False)) for pair in pairs]
    return run | {"num_same": sum(same), "num_compared": len(same)}


def not_fed_before(llm: Any, steady: Any) -> dict[str, Any]:
    """On prefixes that the head was fed or not; and where fewer hidden states are kept
    than its prompts have."""
    seen = {"again": one_pass(llm)}
    assert llm.reset_prefix_cache()
    seen["not fed"] = pass_with(llm, FixedDraftLength(0))
    seen["shared"] = compared(llm, DraftLengthPolicy(), steady)
    assert llm.reset_prefix_cache()
    speculator = model_runner(llm).speculator
    cursor, num_rows = speculator._cursor, speculator._cursor.num_rows
    cursor.num_rows = 4 * speculator.max_num_tokens
    seen["few kept"] = compared(llm, LateLengths(9), steady)
    assert llm.reset_prefix_cache()
    seen["few kept, idle"] = pass_with(llm, FixedDraftLength(0))
    assert llm.reset_prefix_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator, "_feed_oldest", lambda input_batch: None)
        with SpiedSlots(llm) as are_own:
            seen["lost"] = pass_with(llm, LateLengths(20), max_tokens=LONGER)
        seen["lost"] |= {"are_own": are_own}
        seen["before, lost"] = pass_with(llm, DraftLengthPolicy(), max_tokens=LONGER)
    cursor.num_rows = num_rows
    return seen


def failing(llm: Any) -> dict[str, Any]:
    """With parts that raise now and then, and healthy again."""
    speculator = model_runner(llm).speculator
    with pytest.MonkeyPatch.context() as patch:
        parts = (("_plan", 5), ("_run_head", 2), ("_backfill", 2))
        broken = break_parts(patch, *((speculator, *part) for part in parts))
        seen = {"failing": pass_with(llm, PausedLengths())}
    seen["failing"]["num_failures"] = [part.num_failures for part in broken]
    return seen | {"healed": one_pass(llm)}


def passes(llm: Any, name: str) -> dict[str, Any]:
    from vllm_emssd.integration.v2.eagle_speculator import KeptStates

    if name == "stock":  # which gives other tokens with a seed
        return {"greedy": one_pass(llm)}
    if name == "plain":
        return {
            "greedy": one_pass(llm),
            "seeded": one_pass(llm, seed=7, temperature=1.0),
            "structured": one_pass(llm, **structured()),
            "lost": one_pass(llm, max_tokens=LONGER),
            "sessions": sessions(llm),
        }
    if "mixed" in name:
        return mixing(llm, name)
    if "auto" in name:
        return automatic(llm)
    with SpiedDrafts(llm) as steady:  # of most texts at least the first
        seen = {"greedy": one_pass(llm)}
    with SpiedDrafts(llm) as firsts:
        pass_with(llm, FixedDraftLength(1))
    steady = firsts | steady
    seen["ragged"] = compared(llm, RaggedLengths(), steady)
    if "trimmed" in name:
        return seen
    seen["paused"] = compared(llm, PausedLengths(), steady)
    if name == "fixed":
        seen["seeded"] = one_pass(llm, seed=7, temperature=1.0)
        seen["structured"] = one_pass(llm, **structured())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KeptStates, "of", lambda kept, kv_slots: 0.0)
            seen["without states"] = compared(llm, PausedLengths(), steady)
        seen |= failing(llm)
    if "cached" in name:
        seen["sessions"] = sessions(llm)
        seen |= not_fed_before(llm, steady)
    return seen


def run_all(*only: str) -> dict[str, Any]:
    engines = {
        "plain": EngineConfig(**SMALL),
        "stock": EngineConfig(STOCK_HEAD, **SMALL),
        "fixed": EngineConfig(HEAD, **SMALL),
        "cached": EngineConfig(HEAD, **CACHED),
        "tight": EngineConfig(HEAD, **TIGHT),
        "async cached": EngineConfig(HEAD, **asynchronous(CACHED)),
        "async tight": EngineConfig(HEAD, **asynchronous(TIGHT)),
        "async auto": EngineConfig(HEAD | AUTO, **asynchronous(CACHED)),
        "async mixed": EngineConfig(BOTH, **asynchronous(CACHED)),
        "async trimmed": EngineConfig(HEAD | TRIM, **asynchronous(SMALL)),
    }
    return run_engines(engines, passes, only)
