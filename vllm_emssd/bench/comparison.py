"""From rounds to ratios: medians, spread, and how sure one can be of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from vllm_emssd.bench.harness import Rounds
from vllm_emssd.bench.methods import AUTOMATIC, FIXED_LENGTH, MIXED, VLLM_OWN
from vllm_emssd.bench.round import Round
from vllm_emssd.bench.vanilla import replay_round

NUM_RESAMPLES = 4000
COVERAGE = 0.95

# Ratios that answer a question of their own; each method over plain comes on top.
PAIRS: tuple[tuple[str, str], ...] = (
    ("emssd", "stock"),
    ("emssd", "padded"),
    ("llma", "ngram"),
    ("llma", "ngram-longest"),
    ("llma", "suffix"),
    ("llma", "llma-padded"),
    ("llma-auto", "llma-padded"),
    ("mixed-auto", "suffix"),
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A speed over another's, with its bootstrap interval (95 %)."""

    ratio: float
    low: float
    high: float


def speed_ratio(
    seconds: Sequence[float], reference: Sequence[Sequence[float]]
) -> Ratio:
    """Median speed over the best median speed of `reference`'s methods.

    Resamples rounds, the same of every method: what disturbed one round disturbed all.
    seconds: [num_rounds]; reference: [num_methods][num_rounds].
    """
    ours, others = np.asarray(seconds), np.asarray(reference)
    generator = np.random.default_rng(0)
    picks = generator.integers(len(ours), size=(NUM_RESAMPLES, len(ours)))
    resampled = np.median(others[:, picks], axis=2).min(axis=0) / np.median(
        ours[picks], axis=1
    )
    low, high = np.quantile(resampled, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    ratio = np.median(others, axis=1).min() / np.median(ours)
    return Ratio(float(ratio), float(low), float(high))


def spread(seconds: Sequence[float]) -> float:
    """Middle half of the rounds, over their median."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


def compare_all(rounds: Rounds) -> list[dict[str, Any]]:
    """One result for each number of requests at once."""
    return [
        {
            "batch": batch,
            "methods": {name: summary(done) for name, done in by_method.items()},
            "ratios": ratios(
                {n: [r.s_per_token for r in done] for n, done in by_method.items()}
            ),
        }
        for batch, by_method in rounds.items()
    ]


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Of seconds a token by method and round: `emssd/stock`, `auto/best(plain, stock)`.

    The base is `plain`; in one engine that speculates, `k0` comes nearest to it.
    """
    base = "plain" if "plain" in seconds else "k0"
    lengths = [name for name in seconds if FIXED_LENGTH.fullmatch(name)]
    plain = ["plain"] if "plain" in seconds else []
    vllm_own = [name for name in seconds if VLLM_OWN.fullmatch(name)]
    ours = [name for name in seconds if name not in plain + vllm_own + lengths]
    compared = [(name, [base]) for name in seconds if name != base]
    compared += [(a, [b]) for a, b in PAIRS]
    for others in (vllm_own, plain + vllm_own):
        compared += [(name, others) for name in ours if others]
    if len(lengths) > 1:
        compared += [(name, plain + lengths) for name in (AUTOMATIC, MIXED)]
    compared.append((MIXED, [AUTOMATIC, "llma-auto"]))
    return {
        _title(name, against): asdict(
            speed_ratio(seconds[name], [seconds[other] for other in against])
        )
        for name, against in compared
        if {name, *against} <= seconds.keys()
    }


def _title(name: str, against: Sequence[str]) -> str:
    is_one = len(against) == 1
    return f"{name}/{against[0]}" if is_one else f"{name}/best({', '.join(against)})"


def padding(
    batch: int, rounds: Mapping[str, Sequence[Round]], num_prompt_tokens: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """What the paper's vanilla would have computed for the drafts that our unpadded
    methods made. Of whole batches.

    num_prompt_tokens: of the workload's requests.
    """
    return {
        name: asdict(
            replay_round(
                rounds[name][0],
                num_prompt_tokens[: len(rounds[name][0].outputs)],
                batch,
            )
        )
        for name in ("llma", "llma-auto", "emssd")
        if name in rounds
    }


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over the rounds; the histogram is of all rounds together."""
    accepted = sum((r.accepted_histogram() for r in rounds), Counter())
    return {
        "tokens_per_s": 1 / median(r.s_per_token for r in rounds),
        "spread": spread([r.s_per_token for r in rounds]),
        "num_rounds": len(rounds),
        **_medians([r.counts() for r in rounds]),
        "step_ms": _medians([r.step_ms() for r in rounds]),
        "accepted_histogram": dict(sorted(accepted.items())),
        "emssd_stats": _medians([r.emssd_stats for r in rounds]),
    } | ({"profile": rounds[-1].profile} if rounds[-1].profile else {})


def _medians(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(median(d[key] for d in dicts)) for key in dicts[0]}
