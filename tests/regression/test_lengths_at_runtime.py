"""Draft lengths fixed, speculation turned off and on again, and one of two proposers
left out, in an engine that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine import (
    DRAFT_MODEL,
    MIXED,
    EngineConfig,
    counting,
    greedy,
    model_runner,
    prompts,
    running,
)
from vllm_emssd.config import EmssdConfig
from vllm_emssd.integration.cpu.row_padding import ROW_COUNTS
from vllm_emssd.integration.drafting import DraftingRunner

AUTO = {"draft_length": "auto", "num_speculative_tokens": 5}


def drafts_a_step(llm: Any, num_draft_tokens: int | None) -> tuple[float, Any]:
    """Of each request that decodes; and the tokens."""
    llm.collective_rpc("emssd_fix_draft_length", args=(num_draft_tokens,))
    with counting(llm) as made:
        tokens = greedy(llm, [prompts()[0]], max_tokens=40)
    # The step that ends the prompt verifies nothing.
    return made["num_draft_tokens"] / (made["num_request_steps"] - 1), tokens


@contextmanager
def rows_of_steps(llm: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows that each step needed, and those that it computed."""
    runner, rows = model_runner(llm), []
    determine = runner._determine_batch_execution_and_padding

    def seen(num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        determined = determine(num_tokens, *args, **kwargs)
        rows.append((num_tokens, determined[1].num_tokens))
        return determined

    runner._determine_batch_execution_and_padding = seen
    yield rows
    del runner._determine_batch_execution_and_padding


def test_lengths_change_and_tokens_do_not() -> None:
    with running(EngineConfig(DRAFT_MODEL | AUTO)) as llm:
        three, tokens = drafts_a_step(llm, 3)
        # The last steps have fewer tokens left to draft.
        assert 2.5 < three <= 3
        with rows_of_steps(llm) as rows:
            assert drafts_a_step(llm, 0) == (0, tokens)
        assert not {needed for needed, _ in rows} <= set(ROW_COUNTS)
        assert all(computed == needed for needed, computed in rows), "as without drafts"
        one, tokens_of_one = drafts_a_step(llm, 1)
        assert 0.9 < one <= 1
        assert tokens_of_one == tokens
        automatic, tokens_of_automatic = drafts_a_step(llm, None)
        assert 0 <= automatic <= 5
        assert tokens_of_automatic == tokens
        for wrong in (-1, 6):
            with pytest.raises(ValueError, match="give 0 to 5"):
                llm.collective_rpc("emssd_fix_draft_length", args=(wrong,))
        assert drafts_a_step(llm, 0) == (0, tokens), "the engine goes on"


def test_a_proposer_is_left_out_and_comes_back() -> None:
    """Drafts of a model cost rows of it, copies do not; tokens stay the same."""
    text = prompts()[0]
    seen = {}
    with running(EngineConfig(MIXED | AUTO)) as llm:
        three, no_copies = drafts_a_step(llm, 3)
        assert 2.5 < three <= 3
        assert drafts_a_step(llm, 0) == (0, no_copies)
        for proposer in ("draft_model", "llma", None):
            llm.collective_rpc("emssd_use_proposer", args=(proposer,))
            with counting(llm) as counts:
                tokens = greedy(llm, [text + text], max_tokens=40)
            seen[proposer] = counts, tokens
        with pytest.raises(ValueError, match="makes no drafts here"):
            llm.collective_rpc("emssd_use_proposer", args=("ngram",))
    assert all(tokens == seen[None][1] for _, tokens in seen.values())
    assert all(counts["num_draft_tokens"] > 0 for counts, _ in seen.values())
    rows = {name: counts["num_draft_rows"] for name, (counts, _) in seen.items()}
    assert rows["llma"] == 0 < rows["draft_model"]


@pytest.mark.parametrize(
    ("proposer", "automatic"),
    [("draft_model", None), ("llma", object()), ("mixed", None)],
)
def test_says_what_it_needs(proposer: str, automatic: object) -> None:
    """On either runner: automatic lengths of a draft model; and to mix."""
    runner = DraftingRunner()
    runner.emssd_config = EmssdConfig(proposer=proposer)
    runner._automatic = automatic  # type: ignore[assignment]
    with pytest.raises(ValueError, match='"draft_length": "auto"'):
        runner.fix_draft_length(1)
    if proposer != "mixed":
        with pytest.raises(ValueError, match='only "proposer": "mixed"'):
            runner.use_proposer("llma")
