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
    EngineConfig,
    running,
    stop_counting_others,
)
from tests.lossless.distribution import FALSE_ALARM, homogeneity
from tests.lossless.engines import Sampled, sample, texts

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
SLOW = tuple(case for case in PARAMETERS if case not in FAST)
SAMPLED_DRAFTS = {"draft_sample_method": "probabilistic"}
PROBABILISTIC = DRAFT_MODEL | SAMPLED_DRAFTS
CONFIGS = {
    "plain": EngineConfig(),
    "draft_model": EngineConfig(DRAFT_MODEL, prefix_caching=True),
    "draft_model, probabilistic": EngineConfig(PROBABILISTIC, prefix_caching=True),
    "llma": EngineConfig(LLMA, prefix_caching=True),
    "mixed": EngineConfig(MIXED | SAMPLED_DRAFTS, prefix_caching=True),
    "eagle3, probabilistic": EngineConfig(EAGLE3 | SAMPLED_DRAFTS, prefix_caching=True),
}
# The end of it repeats, so that llma has something to copy.
REPEATING = "x = first(a, b)\ny = first(a, c)\nz = first(a, d)\nw = first(a"


def draw(llm: Any, **parameters: Any) -> Sampled:
    """`NUM_SAMPLES` continuations, of a repeating and of a real prompt in turn. Without
    seeds of their own: stock's CPU runner dies of those."""
    prompts = [REPEATING, texts(1)[0]]
    params = SamplingParams(max_tokens=4, ignore_eos=True, **parameters)
    return sample(llm, [prompts[i % 2] for i in range(NUM_SAMPLES)], params)


@cache
def results(name: str, cases: tuple[str, ...]) -> dict[str, Sampled]:
    """Samples of some cases, from one engine with a seed of its own."""
    stop_counting_others()
    seed = 1 + list(CONFIGS).index(name)
    config = dataclasses.replace(CONFIGS[name], options={"seed": seed})
    with running(config) as llm:
        return {case: draw(llm, **PARAMETERS[case]) for case in cases}


def compare(plain: Sampled, ours: Sampled) -> float:
    """The lower of the two prompts' p-values."""
    return min(
        homogeneity(
            [tuple(tokens) for tokens in plain.token_ids[prompt::2]],
            [tuple(tokens) for tokens in ours.token_ids[prompt::2]],
        )
        for prompt in (0, 1)
    )


@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
@pytest.mark.parametrize(
    "name",
    [
        "draft_model",
        "draft_model, probabilistic",
        "eagle3, probabilistic",
        "llma",
        pytest.param("mixed", marks=pytest.mark.slow),
    ],
)
def test_distribution_is_the_targets(name: str, case: str) -> None:
    cases = FAST if case in FAST else SLOW
    seen = results(name, cases)[case]
    assert seen.num_accepted_tokens > 50
    assert compare(results("plain", cases)[case], seen) > FALSE_ALARM
