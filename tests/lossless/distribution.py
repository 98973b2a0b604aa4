"""Do two samples of token sequences come from one distribution?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import chi2_contingency

FALSE_ALARM = 1e-4  # chance that a test fails for a right sampler
RARE = 10  # outcomes seen fewer times in both together are pooled


def homogeneity(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """p-value of the chi-square test that both were drawn alike.

    Sequences are compared by every prefix length at once: outcomes are whole
    sequences, rare ones pooled by their longest prefix that is common enough.
    """
    outcomes = _pool(first, second)
    counts = [Counter(outcomes[: len(first)]), Counter(outcomes[len(first) :])]
    names = sorted(set(outcomes), key=repr)
    table = np.array([[count[name] for name in names] for count in counts])
    if table.shape[1] < 2:
        return 1.0
    return float(chi2_contingency(table).pvalue)


def _pool(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[Hashable]:
    sequences = [tuple(s) for s in (*first, *second)]
    prefixes: Counter[tuple] = Counter(
        s[:length] for s in sequences for length in range(len(s) + 1)
    )
    return [
        next(s[:n] for n in range(len(s), -1, -1) if prefixes[s[:n]] >= RARE)
        for s in sequences
    ]
