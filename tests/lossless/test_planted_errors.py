"""The suite catches the errors this field makes: each is planted, and must be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import vllm.v1.sample.rejection_sampler as rejection_sampler

from tests.engine import (
    DRAFT_MODEL,
    EngineConfig,
    greedy,
    model_runner,
    running,
    stats,
    stop_counting_others,
)
from tests.lossless.distribution import FALSE_ALARM, homogeneity
from tests.lossless.engines import sample, texts
from tests.lossless.test_sampled import PARAMETERS, PROBABILISTIC, draw, results

SEED = 77_000_000


def _p_values(llm: Any, case: str) -> list[float]:
    seen = draw(llm, SEED, **PARAMETERS[case])
    plain = results("plain")[case]
    return [
        homogeneity(
            [tuple(t) for t in plain.token_ids[prompt::2]],
            [tuple(t) for t in seen.token_ids[prompt::2]],
        )
        for prompt in (0, 1)
    ]


@contextmanager
def stocks_expand() -> Iterator[None]:
    """Stock's kernel reads uninitialised memory; what it finds there is made certain
    here: ones, as after a fresh page of temperatures."""

    def expand(x: Any, cu_num_tokens: Any, num_tokens: int, *replace: Any) -> Any:
        return x.new_ones(num_tokens)

    ours = rejection_sampler.expand_batch_to_tokens
    rejection_sampler.expand_batch_to_tokens = expand
    try:
        yield
    finally:
        rejection_sampler.expand_batch_to_tokens = ours


def test_stocks_lost_temperature_is_seen() -> None:
    stop_counting_others()
    with running(EngineConfig(DRAFT_MODEL)) as llm, stocks_expand():
        assert min(_p_values(llm, "0.5")) < FALSE_ALARM


def _keeping_only_even_drafts(propose: Callable[..., Any]) -> Callable[..., Any]:
    """Cut each request's drafts before the first odd token: keeping by value."""

    def planted(batch: Any) -> list[list[int]]:
        kept = []
        for tokens in propose(batch):
            odd = [i for i, token in enumerate(tokens) if token % 2]
            kept.append(tokens[: odd[0]] if odd else tokens)
        return kept

    return planted


def test_keeping_drafts_by_their_sampled_value_is_seen() -> None:
    stop_counting_others()
    with running(EngineConfig(PROBABILISTIC)) as llm:
        proposer = model_runner(llm)._proposer
        proposer.propose = _keeping_only_even_drafts(proposer.propose)
        assert min(_p_values(llm, "1.0")) < FALSE_ALARM


def test_reusing_rejected_drafts_kv_is_seen() -> None:
    """A cursor that counts every fed draft as accepted leaves rejected drafts' K/V in
    place. Output stays exact, since the target decides; acceptance gives it away."""
    stop_counting_others()
    with running(EngineConfig(DRAFT_MODEL)) as llm:
        greedy(llm, texts())
        right = stats(llm)
        cursor = model_runner(llm)._cursor
        verified = cursor.record_verified
        cursor.record_verified = lambda req_id, accepted: verified(
            req_id, max(accepted, min(1, cursor._requests[req_id].num_fed_drafts))
        )
        greedy(llm, texts())
        both = stats(llm)
    accepted = both["num_accepted_tokens"] - right["num_accepted_tokens"]
    assert accepted < 0.9 * right["num_accepted_tokens"]


@pytest.mark.parametrize("wrong", ["temperature", "nothing"])
def test_the_test_itself(wrong: str) -> None:
    """Plain against plain passes; against another temperature it does not."""
    from vllm import SamplingParams

    stop_counting_others()
    with running(EngineConfig()) as llm:
        other = 0.6 if wrong == "temperature" else 0.5
        params = [
            SamplingParams(max_tokens=4, ignore_eos=True, seed=i, temperature=other)
            for i in range(1000)
        ]
        seen = sample(llm, [texts(1)[0]] * 1000, params)
    plain = [tuple(t) for t in results("plain")["0.5"].token_ids[1::2]]
    p_value = homogeneity(plain, [tuple(t) for t in seen.token_ids])
    assert (p_value < FALSE_ALARM) == (wrong == "temperature")
