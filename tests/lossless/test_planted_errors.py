"""The suite catches the errors this field makes: each is planted, and must be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import vllm.v1.sample.rejection_sampler as rejection_sampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from tests.engine import (
    DRAFT_MODEL,
    SMALL_BLOCKS,
    STOCK,
    EngineConfig,
    greedy,
    model_runner,
    running,
    stats,
    stop_counting_others,
)
from tests.lossless.distribution import FALSE_ALARM
from tests.lossless.engines import Sampled, engine, sample, texts
from tests.lossless.test_greedy import STOPS, arrangements, stops_at_min_tokens
from tests.lossless.test_greedy import results as greedy_results
from tests.lossless.test_sampled import (
    NUM_SAMPLES,
    PARAMETERS,
    PROBABILISTIC,
    compare,
    draw,
    results,
)
from vllm_emssd.integration.v1 import rejection_sampler as v1_rejection_sampler
from vllm_emssd.integration.v1.rejection_sampler import UnpadRejectionSampler
from vllm_emssd.integration.v1.thinking_budget import ThinkingBudgets

pytestmark = pytest.mark.slow


CASES = ("0.5", "0.8")


@pytest.fixture(scope="module", autouse=True)
def plain() -> dict[str, Sampled]:
    """Before any other engine: two do not fit into one process."""
    return results("plain", CASES)


def _p_value(llm: Any, case: str, num_samples: int = NUM_SAMPLES) -> float:
    seen = draw(llm, num_samples, **PARAMETERS[case])
    return compare(results("plain", CASES)[case], seen)


@contextmanager
def stocks_expand() -> Iterator[None]:
    """Stock's kernel reads uninitialised memory; what it finds there is made certain
    here: ones, as after a fresh page of temperatures."""

    def expand(x: Any, cu_num_tokens: Any, num_tokens: int, **replace: Any) -> Any:
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
        assert _p_value(llm, "0.5") < FALSE_ALARM


def _keeping_only_the_likeliest(runner: Any) -> Callable[[Any], list[list[int]]]:
    """Cut each request's sampled drafts before the first that is not the drafter's
    likeliest token: keeping by value (DSpark, appendix A)."""
    propose, draft_probs = runner._proposer.propose, runner.paged_drafter.draft_probs

    def planted(batch: Any) -> list[list[int]]:
        kept = []
        for req_id, tokens in zip(batch.req_ids, propose(batch), strict=True):
            likeliest = [int(p.argmax()) for p in draft_probs.get(req_id, ())]
            pairs = zip(tokens, likeliest, strict=False)
            same = [token == best for token, best in pairs]
            kept.append(tokens[: same.index(False) if False in same else None])
        return kept

    return planted


def test_keeping_drafts_by_their_sampled_value_is_seen() -> None:
    stop_counting_others()
    config = EngineConfig(PROBABILISTIC, prefix_caching=True, options=SMALL_BLOCKS)
    with running(config) as llm:
        runner = model_runner(llm)
        runner._proposer.propose = _keeping_only_the_likeliest(runner)
        assert _p_value(llm, "0.8", 3 * NUM_SAMPLES) < FALSE_ALARM


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


def _shift_forced_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of thinking is forced one row too far."""
    force = ThinkingBudgets.apply_to_logits

    def shifted(self: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
        return force(self, logits.roll(-1, 0), *args, **kwargs).roll(1, 0)

    monkeypatch.setattr(ThinkingBudgets, "apply_to_logits", shifted)


def _keep_finished_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own: a finished request's budget goes on in the one that gets its row."""
    stock = ThinkingBudgetStateHolder.sync_batch
    monkeypatch.setattr(ThinkingBudgets, "sync_batch", stock)


def _mask_bonus_row_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row behind the drafts is masked by the answer's length before them."""
    monkeypatch.setattr(
        v1_rejection_sampler, "behind_drafts", lambda processors, num_drafts: processors
    )


def _keep_generators_after_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator is not moved back where its bonus token was not emitted."""
    sample_seeded = UnpadRejectionSampler._sample_seeded

    def planted(self: Any, *args: Any) -> Any:
        seeded = sample_seeded(self, *args)
        seeded.rejected.clear()
        return seeded

    monkeypatch.setattr(UnpadRejectionSampler, "_sample_seeded", planted)


@pytest.mark.parametrize(
    ("plant", "case"),
    [
        (_shift_forced_tokens, "thinking_token_budget"),
        (_keep_finished_budgets, "thinking_token_budget, seed"),
        (_mask_bonus_row_too_late, STOPS),
        (_keep_generators_after_rejection, "seed"),
    ],
)
def test_wrong_rows_and_states_are_seen(
    plant: Callable[[pytest.MonkeyPatch], None],
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain_results = greedy_results("plain")
    if case == STOPS:
        prompts, params, expected = stops_at_min_tokens()
    else:
        prompts, params = arrangements(case)[case]
        expected = plain_results[case].token_ids
    stop_counting_others()
    with engine("draft_model") as llm:
        assert sample(llm, prompts, params).token_ids == expected
        plant(monkeypatch)
        assert sample(llm, prompts, params).token_ids != expected


@pytest.mark.parametrize("temperature", [0.6, 0.8])
def test_the_test_itself(temperature: float) -> None:
    """Plain against plain passes; against another temperature it does not."""
    stop_counting_others()
    with running(EngineConfig(options={"seed": 99})) as llm:
        seen = draw(llm, temperature=temperature)
    p_value = compare(results("plain", CASES)["0.8"], seen)
    assert (p_value < FALSE_ALARM) == (temperature != 0.8)


def test_stock_with_the_fix_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`EMSSD_CPU_FIXES=1` makes stock's own draft_model sample rightly."""
    monkeypatch.setenv("EMSSD_CPU_FIXES", "1")
    stop_counting_others()
    with running(EngineConfig(STOCK)) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        assert type(worker).__name__ == "FixedCPUWorker"
        assert _p_value(llm, "0.8") > FALSE_ALARM
