"""Sampled output follows the target's distribution.

Plain and speculative engines sample the first tokens after a repeating and a real
prompt a thousand times; a chi-square test of homogeneity compares the two. With the
1e-4 limit a right sampler fails one test in 10,000 engine seeds; the seeds are fixed.
That the tests do fail on wrong samplers is shown in `test_planted_errors.py`.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine import (
    DRAFT_MODEL,
    EAGLE3,
    LLMA,
    MIXED,
    SMALL_BLOCKS,
    EngineConfig,
    prompts,
    running,
    stop_counting_others,
)
from tests.lossless.distribution import FALSE_ALARM, homogeneity
from tests.lossless.engines import Sampled, sample

NUM_SAMPLES = 1000
PARAMETERS: dict[str, dict[str, Any]] = {
    "0.5": {"temperature": 0.5},
    "0.8": {"temperature": 0.8},
    "1.0": {"temperature": 1.0},
    "top_k": {"temperature": 0.8, "top_k": 8},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "logit_bias": {"temperature": 0.8, "logit_bias": {10: 2.0, 201: 2.0}},
}
FAST = ("0.8", "min_p")
SAMPLED_DRAFTS = {"draft_sample_method": "probabilistic"}
PROBABILISTIC = DRAFT_MODEL | SAMPLED_DRAFTS
CONFIGS = {
    "plain": EngineConfig(prefix_caching=True),
    "draft_model": EngineConfig(DRAFT_MODEL, prefix_caching=True),
    "draft_model, probabilistic": EngineConfig(PROBABILISTIC, prefix_caching=True),
    "llma": EngineConfig(LLMA, prefix_caching=True),
    "mixed": EngineConfig(MIXED | SAMPLED_DRAFTS, prefix_caching=True),
    "eagle3, probabilistic": EngineConfig(EAGLE3 | SAMPLED_DRAFTS, prefix_caching=True),
    "eagle3": EngineConfig(EAGLE3, prefix_caching=True),
}
OURS = [name for name in CONFIGS if name != "plain"]
# The end of it repeats, so that llma has something to copy.
REPEATING = "x = first(a, b)\ny = first(a, c)\nz = first(a, d)\nw = first(a"


def draw(llm: Any, num_samples: int = NUM_SAMPLES, **parameters: Any) -> Sampled:
    """Continuations of a repeating and of a real prompt in turn. Without seeds of their
    own: stock's CPU runner dies of those."""
    texts = [REPEATING, prompts()[0]]
    params = SamplingParams(max_tokens=4, ignore_eos=True, **parameters)
    return sample(llm, [texts[i % 2] for i in range(num_samples)], params)


@cache
def results(name: str, cases: tuple[str, ...]) -> dict[str, Sampled]:
    """Samples of some cases, from one engine with a seed of its own."""
    stop_counting_others()
    seed = 1 + list(CONFIGS).index(name)
    config = dataclasses.replace(CONFIGS[name], options=SMALL_BLOCKS | {"seed": seed})
    with running(config) as llm:
        return {case: draw(llm, **PARAMETERS[case]) for case in cases}


def compare(plain: Sampled, ours: Sampled) -> float:
    """The lower of the two prompts' p-values."""
    return least_p_value(plain.token_ids, ours.token_ids)


def least_p_value(plain: list[list[int]], ours: list[list[int]]) -> float:
    return min(
        homogeneity(*([tuple(t) for t in ids[prompt::2]] for ids in (plain, ours)))
        for prompt in (0, 1)
    )


def cases_of(name: str, case: str) -> tuple[str, ...]:
    """Those drawn from one engine with this one. Where drafts are greedy, or copies,
    filters are seen with a seed too, token for token (`test_greedy.py`)."""
    fast = FAST if name in ("plain", "draft_model, probabilistic") else FAST[:1]
    return fast if case in fast else tuple(c for c in PARAMETERS if c not in fast)


def combination(name: str, case: str) -> Any:
    is_fast = name not in ("mixed", "eagle3") and case in cases_of(name, "0.8")
    return pytest.param(name, case, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "case"), [combination(n, c) for n in OURS for c in PARAMETERS]
)
def test_distribution_is_the_targets(name: str, case: str) -> None:
    seen = results(name, cases_of(name, case))[case]
    assert seen.num_accepted_tokens > 50
    plain = results("plain", cases_of("plain", case))[case]
    assert compare(plain, seen) > FALSE_ALARM
