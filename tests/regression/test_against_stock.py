"""Greedy float32 output, acceptance and rows, against plain vLLM and stock drafts."""

from __future__ import annotations

import pytest

from tests.engine import NUM_SPECULATIVE_TOKENS
from tests.regression.runs import BATCHES, OURS, run

DRAFT_MODEL_RUNS = [name for name in OURS if name.startswith(("draft_model", "eagle"))]


@pytest.mark.parametrize("name", ["stock", *OURS])
@pytest.mark.parametrize("batch", BATCHES)
def test_greedy_tokens_are_plain_decoding(name: str, batch: int) -> None:
    expected = run("plain").first.token_ids[batch]
    assert run(name).first.token_ids[batch] == expected
    assert run(name).second.token_ids[batch] == expected


@pytest.mark.parametrize("name", OURS)
def test_drafts_are_accepted(name: str) -> None:
    for seen in (run(name).first, run(name).second):
        assert seen.num_accepted_tokens > 0.1 * seen.num_draft_tokens > 0


@pytest.mark.parametrize(
    ("name", "stocks_name"),
    [
        ("draft_model", "stock"),
        ("draft_model, padded", "stock"),
        ("eagle3", "eagle3, stock"),
        ("eagle3, cached", "eagle3, stock"),
    ],
)
def test_acceptance_is_stocks(name: str, stocks_name: str) -> None:
    stock, ours = run(stocks_name).first, run(name).first
    assert ours.num_accepted_tokens == stock.num_accepted_tokens
    assert ours.num_draft_tokens == stock.num_draft_tokens


@pytest.mark.parametrize("name", ["draft_model, cached", "eagle3, cached"])
def test_second_pass_on_cached_prefixes_accepts_as_much(name: str) -> None:
    seen = run(name)
    assert seen.second.num_cached_tokens > seen.first.num_cached_tokens > 0
    first = seen.first.num_accepted_tokens / seen.first.num_draft_tokens
    second = seen.second.num_accepted_tokens / seen.second.num_draft_tokens
    assert second == pytest.approx(first, rel=0.01)


@pytest.mark.parametrize("name", [n for n in OURS if "small cache" in n])
def test_small_cache_preempts(name: str) -> None:
    seen = run(name)
    assert seen.first.num_preemptions > 0
    assert seen.second.num_preemptions > 0  # of sampled requests


@pytest.mark.parametrize("name", DRAFT_MODEL_RUNS)
def test_counters_agree_with_the_draft_model(name: str) -> None:
    seen = run(name).first
    assert seen.counts["num_draft_rows"] == seen.draft_rows
    assert seen.counts["num_draft_forwards"] == seen.draft_forwards


@pytest.mark.parametrize("name", OURS)
def test_counters_agree_with_vllm(name: str) -> None:
    seen = run(name).first
    assert seen.counts["num_accepted_tokens"] == seen.num_accepted_tokens
    if "padded" not in name or "draft_model" in name:
        assert seen.counts["num_draft_tokens"] == seen.num_draft_tokens
    assert (
        seen.counts["num_emitted_tokens"]
        == seen.counts["num_accepted_tokens"] + seen.counts["num_request_steps"]
    )


def test_decode_rows_at_most_half_of_stocks() -> None:
    """Rows of generated tokens: all rows less those of the prompts, fed once each."""
    stock, ours = run("stock").first, run("draft_model").first
    assert stock.num_prompt_tokens == ours.num_prompt_tokens
    stock_decode = stock.draft_rows - stock.num_prompt_tokens
    ours_decode = ours.draft_rows - ours.num_prompt_tokens
    assert ours.counts["num_draft_rows_decode"] == ours_decode
    assert ours_decode <= 0.50 * stock_decode


def test_padded_rows_counter_is_what_stock_feeds() -> None:
    stock, ours = run("stock").first, run("draft_model").first
    assert ours.counts["num_padded_draft_rows"] == pytest.approx(
        stock.draft_rows, rel=0.02
    )


def test_decoding_request_costs_at_most_k_plus_one_rows_a_step() -> None:
    counts = run("draft_model").first.counts
    most = (NUM_SPECULATIVE_TOKENS + 1) * counts["num_request_steps"]
    assert 0 < counts["num_draft_rows_decode"] <= most


@pytest.mark.parametrize("name", ["draft_model", "llma"])
def test_padding_verifies_the_longest_draft_and_accepts_the_same(name: str) -> None:
    ragged, padded = run(name).first.counts, run(f"{name}, padded").first.counts
    assert padded["num_verify_rows"] == padded["num_padded_verify_rows"]
    assert padded["num_accepted_tokens"] == ragged["num_accepted_tokens"]
    if name == "llma":
        assert padded["num_verify_rows"] > ragged["num_verify_rows"]
