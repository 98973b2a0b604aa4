"""Exact with automatic lengths, whatever they are.

Real costs would settle on a few lengths; here every step gets random ones, so that
lengths change from step to step and request to request, 0 and full included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from tests.engine import (
    DRAFT_MODEL,
    EAGLE3,
    LLMA,
    MIXED,
    EngineConfig,
    greedy,
    model_runner,
    running,
    stop_counting_others,
)
from tests.lossless.distribution import FALSE_ALARM
from tests.lossless.engines import sample, texts
from tests.lossless.test_sampled import (
    FAST,
    PARAMETERS,
    PROBABILISTIC,
    SAMPLED_DRAFTS,
    compare,
    draw,
)
from tests.lossless.test_sampled import results as sampled_results
from vllm_emssd.draft_length import CostTable

AUTO = {"draft_length": "auto"}
CONFIGS = {
    "draft_model": EngineConfig(DRAFT_MODEL | AUTO, prefix_caching=True),
    "probabilistic": EngineConfig(PROBABILISTIC | AUTO, prefix_caching=True),
    "eagle3": EngineConfig(EAGLE3 | AUTO | SAMPLED_DRAFTS, prefix_caching=True),
    "llma": EngineConfig(LLMA | AUTO, prefix_caching=True),
    "mixed": EngineConfig(MIXED | AUTO | SAMPLED_DRAFTS, prefix_caching=True),
}
pytestmark = pytest.mark.slow


@contextmanager
def random_costs(llm: Any) -> Iterator[None]:
    """Draw new costs after each step: drafts from free to far too expensive."""
    meter = model_runner(llm).step_costs
    rng = np.random.default_rng(0)

    def step_done(num_reqs: int, *args: bool) -> None:
        if meter._drafter is not None:
            meter._drafter.take_timings()
        first, row = rng.choice([0.0, 0.2, 1.0]), rng.choice([0.0, 0.05, 0.5])
        meter.costs.target = CostTable([1, 256], [4.0, 4.0 + 255 * row])
        if meter._drafter is not None:
            meter.costs.draft = CostTable([1, 256], [first, first + 255 * row / 8])

    meter.step_done = step_done
    yield


@cache
def _runs(name: str) -> tuple[Any, Any, Any, set[int], set[int]]:
    """Greedy tokens and counts of 24 prompts, two sampled cases; lengths seen, and rows
    of padding that the target computed along."""
    stop_counting_others()
    lengths: set[int] = set()
    rows_added: set[int] = set()
    with running(CONFIGS[name]) as llm, random_costs(llm):
        runner = model_runner(llm)
        proposer = runner._proposer
        propose = proposer.propose
        determine = runner._determine_batch_execution_and_padding

        def seen(batch: Any) -> Any:
            drafts = propose(batch)
            lengths.update(map(len, drafts))
            return drafts

        def padded(num_tokens: int, *args: Any, **kwargs: Any) -> Any:
            determined = determine(num_tokens, *args, **kwargs)
            num_rows = determined[1].num_tokens
            assert num_tokens <= num_rows < num_tokens + 32
            rows_added.add(num_rows - num_tokens)
            return determined

        proposer.propose = seen
        runner._determine_batch_execution_and_padding = padded
        tokens = greedy(llm, texts(24))
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        counted = sample(llm, texts(24), params)
        drawn = {case: draw(llm, **PARAMETERS[case]) for case in FAST}
    return tokens, counted, drawn, lengths, rows_added


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_plain_decoding(name: str) -> None:
    from tests.regression.runs import run

    tokens, counted, _, lengths, rows_added = _runs(name)
    assert tokens == run("plain").first.token_ids[24]
    assert counted.num_accepted_tokens > 0
    assert len(lengths) >= 4
    assert 0 in lengths
    assert min(rows_added) == 0
    assert len(rows_added) >= 4


@pytest.mark.parametrize("case", FAST)
@pytest.mark.parametrize("name", CONFIGS)
def test_distribution_is_the_targets(name: str, case: str) -> None:
    seen = _runs(name)[2][case]
    assert seen.num_accepted_tokens > 50
    assert compare(sampled_results("plain", FAST)[case], seen) > FALSE_ALARM


def test_idle_steps_change_no_token_and_end_when_drafts_pay() -> None:
    from tests.regression.runs import run

    expected = run("plain").first.token_ids[24]
    stop_counting_others()
    with running(CONFIGS["draft_model"]) as llm:
        runner = model_runner(llm)
        meter, proposer = runner.step_costs, runner._proposer
        propose, num_plans = proposer.propose, 0

        def counted(batch: Any) -> Any:
            nonlocal num_plans
            num_plans += 1
            return propose(batch)

        proposer.propose = counted
        meter.step_done = lambda *_: None  # costs stay
        meter.costs.target = CostTable([1, 256], [4.0, 4.5])
        meter.costs.draft = CostTable([1], [1e4])
        assert greedy(llm, texts(24)) == expected
        skipped = runner.counters.num_steps - num_plans
        assert skipped > runner.counters.num_steps / 3

        before = runner.counters.num_accepted_tokens
        meter.costs.draft = CostTable([1], [0.01])
        assert greedy(llm, texts(24)) == expected
        assert runner.counters.num_accepted_tokens > before + 100
        assert not proposer.skips_step(24)
