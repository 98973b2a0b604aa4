"""Whatever is drafted, what the V2 runner emits follows the target's distribution."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lossless.distribution import FALSE_ALARM, homogeneity
from tests.v2.results import results_of
from tests.v2.verification import KINDS, TARGET, TEMPERATURE, VOCAB, K

pytestmark = pytest.mark.slow  # a minute and a half of interpreted kernels

PROBS = (TARGET / TEMPERATURE).softmax(dim=-1).numpy().astype(np.float64)


def continued(answer: list[int], rng: np.random.Generator) -> tuple[int, ...]:
    """Up to K + 1 tokens, as plain decoding goes on. How many a step emits depends on
    which, so that those alone are no sample."""
    tokens = [0, *answer]
    while len(tokens) < K + 2:
        probs = PROBS[tokens[-1]]
        tokens.append(int(rng.choice(VOCAB, p=probs / probs.sum())))
    return tuple(tokens[1:])


def p_value(answers: list[list[int]]) -> float:
    """The least by position, and of all of them together."""
    rng = np.random.default_rng(0)
    seen = [continued(answer, rng) for answer in answers]
    plain = [continued([], rng) for _ in range(10 * len(seen))]
    positions = [
        homogeneity([(s[i],) for s in seen], [(s[i],) for s in plain])
        for i in range(K + 1)
    ]
    return min(homogeneity(seen, plain), *positions)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_emitted_follows_the_target(kind: str) -> None:
    """With all kinds in one batch."""
    answers = results_of("tests.v2.verification")[kind]
    lengths = np.bincount([len(answer) for answer in answers], minlength=K + 2)
    assert min(lengths[1:]) > 10  # all rejected, some, and none
    assert p_value(answers) > FALSE_ALARM


def test_copies_judged_by_the_drafters_distribution_are_noticed() -> None:
    answers = results_of("tests.v2.verification")["uncertain copies"]
    assert p_value(answers) < FALSE_ALARM
