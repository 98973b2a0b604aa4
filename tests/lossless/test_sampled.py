"""Sampled output follows the target's distribution.

Plain and speculative engines sample the first tokens after one real prompt a few
thousand times; a chi-square test of homogeneity compares the two. With the 1e-4 limit
a right sampler fails one test in 10,000 sets of seeds; the seeds are fixed. That the
tests do fail on wrong samplers is shown in `test_planted_errors.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine import DRAFT_MODEL, LLMA, EngineConfig, running, stop_counting_others
from tests.lossless.distribution import FALSE_ALARM, homogeneity
from tests.lossless.engines import Sampled, sample, texts

NUM_SAMPLES = 2000
PARAMETERS: dict[str, dict[str, Any]] = {
    "0.5": {"temperature": 0.5},
    "0.8": {"temperature": 0.8},
    "1.0": {"temperature": 1.0},
    "top_k": {"temperature": 0.8, "top_k": 8},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "logit_bias": {"temperature": 0.8, "logit_bias": {10: 2.0, 201: 2.0}},
}
PROBABILISTIC = DRAFT_MODEL | {"draft_sample_method": "probabilistic"}
CONFIGS = {
    "plain": EngineConfig(),
    "draft_model": EngineConfig(DRAFT_MODEL, prefix_caching=True),
    "draft_model, probabilistic": EngineConfig(PROBABILISTIC, prefix_caching=True),
    "llma": EngineConfig(LLMA, prefix_caching=True),
}
# The end of it repeats, so that llma has something to copy.
REPEATING = "x = first(a, b)\ny = first(a, c)\nz = first(a, d)\nw = first(a"


def draw(llm: Any, seed: int, **parameters: Any) -> Sampled:
    """`NUM_SAMPLES` continuations of a repeating and of a real prompt, seeded each."""
    prompts = [REPEATING, texts(1)[0]]
    params = [
        SamplingParams(max_tokens=4, ignore_eos=True, seed=seed + i, **parameters)
        for i in range(NUM_SAMPLES)
    ]
    return sample(llm, [prompts[i % 2] for i in range(NUM_SAMPLES)], params)


@cache
def results(name: str) -> dict[str, Sampled]:
    stop_counting_others()
    with running(CONFIGS[name]) as llm:
        return {
            case: draw(llm, hash_free_seed(name, case), **parameters)
            for case, parameters in PARAMETERS.items()
        }


def hash_free_seed(name: str, case: str) -> int:
    """Another range of seeds for each engine and case, the same in every run."""
    index = list(CONFIGS).index(name) * len(PARAMETERS) + list(PARAMETERS).index(case)
    return 1_000_000 * (index + 1)


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "plain"])
def test_distribution_is_the_targets(name: str, case: str) -> None:
    seen = results(name)[case]
    assert seen.num_accepted_tokens > 100
    for prompt in (0, 1):
        plain = [tuple(t) for t in results("plain")[case].token_ids[prompt::2]]
        ours = [tuple(t) for t in seen.token_ids[prompt::2]]
        assert homogeneity(plain, ours) > FALSE_ALARM


def test_seeded_requests_repeat_themselves() -> None:
    """Per-request seeds, fixed lengths: the same batch twice samples the same."""
    with running(CONFIGS["draft_model"]) as llm:
        params = [
            SamplingParams(temperature=0.8, max_tokens=24, seed=i) for i in (1, 2)
        ]
        first = sample(llm, texts(2), params)
        again = sample(llm, texts(2), params)
    assert first.token_ids == again.token_ids
    assert first.num_accepted_tokens > 0


def test_many_seeded_requests_with_chunked_prefill() -> None:
    """Stock's CPU runner dies here: it moves a CPU generator's offset back."""
    config = EngineConfig(LLMA, max_num_batched_tokens=192)
    with running(config) as llm:
        params = [
            SamplingParams(temperature=1, max_tokens=6, seed=i) for i in range(24)
        ]
        alone = [sample(llm, [t], p) for t, p in zip(texts(24), params, strict=True)]
        together = sample(llm, texts(24), params)
    assert len(together.token_ids) == 24
    # The first token depends on its own seed alone, however the prompt was chunked.
    firsts = [tokens[0] for tokens in together.token_ids]
    assert firsts == [one.token_ids[0][0] for one in alone]
