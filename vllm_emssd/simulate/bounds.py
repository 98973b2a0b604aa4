"""What draft lengths can gain at most, whoever chooses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vllm_emssd.simulate.simulator import Decoding, Outcome

_STOPS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_TRIMS = (0.1, 0.2, 0.3, 0.4)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Tokens a second."""

    best_fixed: float
    k: int  # of that length; 0: plain decoding
    threshold: float  # the best,
    trimming: float  # or the best two, with one to trim by; copies: 0
    oracle: float


def find_bounds(
    outcome: Callable[[Decoding], Outcome], most: int, copies: bool
) -> Bounds:
    """`most`: drafts of a request and step."""

    def speed(*how: Any) -> float:
        return outcome(replace(Decoding(*how), copies=copies)).tokens_per_s

    by_k = {k: speed("fixed", k) for k in range(most + 1)}
    best_k = max(by_k, key=lambda k: by_k[k])
    stops = () if copies else _STOPS
    by_stop = [speed("threshold", most, stop) for stop in stops]
    trimmed = [
        speed("threshold", most, stop, trim) for stop in stops for trim in _TRIMS
    ]
    return Bounds(
        by_k[best_k],
        best_k,
        max(by_stop, default=0.0),
        max(trimmed, default=0.0),
        speed("oracle", most),
    )
