"""How many drafts are accepted: against a plain reference, and of a perfect drafter."""

from __future__ import annotations

from tests.engine import (
    DRAFT,
    DRAFT_MODEL,
    NUM_SPECULATIVE_TOKENS,
    TARGET,
    EngineConfig,
    counting,
    greedy,
    running,
    stop_counting_others,
)
from tests.lossless.engines import texts
from tests.reference import GreedySpeculativeDecoding

MAX_TOKENS = 32


def test_engine_agrees_with_the_reference_request_by_request() -> None:
    reference = GreedySpeculativeDecoding(TARGET, DRAFT, NUM_SPECULATIVE_TOKENS)
    stop_counting_others()
    with running(EngineConfig(DRAFT_MODEL, prefix_caching=True)) as llm:
        tokenizer = llm.get_tokenizer()
        for text in texts(4):
            with counting(llm) as counts:
                (token_ids,) = greedy(llm, [text], MAX_TOKENS)
            expected = reference.generate(tokenizer.encode(text), MAX_TOKENS)
            assert token_ids == expected.token_ids
            assert counts["num_accepted_tokens"] == sum(expected.accepted)
            assert counts["num_draft_tokens"] == NUM_SPECULATIVE_TOKENS * len(
                expected.accepted
            )
