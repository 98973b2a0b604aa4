"""From rounds to ratios: medians, spread, and how sure one can be of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from vllm_emssd.bench.harness import Measurement
from vllm_emssd.bench.kv_price import estimate, row_slot_ms
from vllm_emssd.bench.machine_speed import slowness
from vllm_emssd.bench.methods import AUTOMATIC, FIXED_LENGTH
from vllm_emssd.bench.round import Round
from vllm_emssd.bench.row_costs import row_cost
from vllm_emssd.bench.vanilla import replay

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
    ("auto", "emssd"),
    ("llma-auto", "llma"),
    ("mixed-auto", "auto"),
    ("mixed-auto", "llma-auto"),
    ("mixed-auto", "suffix"),
)
# Unpadded and padded sides of the paper's vanilla.
PADDED: dict[str, str] = {"llma": "llma-padded", "emssd": "padded"}
# Methods that choose by themselves, against the better of those a user chooses from.
AGAINST_BEST: dict[str, tuple[str, ...]] = {
    "auto": ("plain", "stock"),
    "llma-auto": ("plain", "ngram"),
    "mixed-auto": ("auto", "llma-auto"),
}


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


def compare(
    batch: int, rounds: dict[str, list[Round]], k: int, in_one_engine: bool = False
) -> dict[str, Any]:
    """One batch size, all methods."""
    seconds = {name: [r.s_per_token for r in done] for name, done in rounds.items()}
    return {
        "batch": batch,
        "methods": {name: _summary(done) for name, done in rounds.items()},
        "ratios": ratios(seconds),
        "at_equal_speed": (
            at_equal_speed(rounds) if in_one_engine and _saw_target(rounds) else None
        ),
        "saving": saving(batch, rounds, k) if _tells_saving(rounds) else None,
    }


def at_equal_speed(rounds: dict[str, list[Round]]) -> dict[str, dict[str, float]]:
    """The ratios had the machine been as slow in all rounds."""
    slow = slowness(rounds)
    return ratios(
        {
            name: [r.s_per_token / s for r, s in zip(done, slow[name], strict=True)]
            for name, done in rounds.items()
        }
    )


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By name: `emssd/stock`, `auto/best(plain, stock)`. In one engine that speculates,
    `k0` is what comes nearest to plain decoding."""
    plain = "plain" if "plain" in seconds else "k0"
    over_plain = [(name, plain) for name in seconds if name != plain]
    pairs: dict[str, tuple[str, tuple[str, ...]]] = {
        f"{a}/{b}": (a, (b,)) for a, b in (*over_plain, *PAIRS)
    }
    lengths = tuple(n for n in seconds if n == "plain" or FIXED_LENGTH.fullmatch(n))
    if len(lengths) > 1:
        pairs[f"{AUTOMATIC}/best({', '.join(lengths)})"] = (AUTOMATIC, lengths)
    for name, others in AGAINST_BEST.items():
        pairs[f"{name}/best({', '.join(others)})"] = (name, others)
    return {
        title: asdict(speed_ratio(seconds[name], [seconds[other] for other in others]))
        for title, (name, others) in pairs.items()
        if {name, *others} <= seconds.keys()
    }


def geometric_means(
    results: Sequence[dict[str, Any]], which: str = "ratios"
) -> dict[str, float]:
    """Of each ratio, over the batch sizes."""
    return {
        title: float(
            np.exp(np.mean([np.log(r[which][title]["ratio"]) for r in results]))
        )
        for title in results[0][which]
    }


def compare_all(
    measured: Measurement,
    num_prompt_tokens: Sequence[int],
    k: int,
    in_one_engine: bool = False,
) -> list[dict[str, Any]]:
    """One result a batch size. num_prompt_tokens: of the workload's requests."""
    return [
        compare(batch, rounds, k, in_one_engine)
        | {"vanilla": vanilla(batch, measured, num_prompt_tokens)}
        for batch, rounds in measured.rounds.items()
    ]


def vanilla(
    batch: int, measured: Measurement, num_prompt_tokens: Sequence[int]
) -> dict[str, Any]:
    """Of each unpadded method that ran beside its padded twin: what the paper's
    vanilla would have computed, and, where K/V was priced, taken."""
    rounds, estimates = measured.rounds[batch], {}
    for name, padded in PADDED.items():
        if not {name, padded} <= rounds.keys():
            continue
        num_requests = 1 + max(e.request for s in rounds[name][0].steps for e in s)
        lens = num_prompt_tokens[:num_requests]
        replays = [replay(done, lens, batch) for done in rounds[name]]
        price = row_slot_ms(measured.forwards[batch].get(padded, ()))
        estimates[name] = estimate(replays, rounds[name], rounds[padded], price)
    return estimates


def _summary(rounds: list[Round]) -> dict[str, Any]:
    """Medians over the rounds; the histogram is of all rounds together."""
    dicts = [r.as_dict() for r in rounds]
    accepted = sum((Counter(d["accepted_histogram"]) for d in dicts), Counter())

    def middle(of: Callable[[dict[str, Any]], float]) -> float:
        return float(median(map(of, dicts)))

    return {
        "tokens_per_s": 1 / median(r.s_per_token for r in rounds),
        "seconds": median(r.seconds for r in rounds),
        "spread": spread([r.s_per_token for r in rounds]),
        "num_rounds": len(rounds),
        **{
            name: middle(lambda d, name=name: d[name])  # type: ignore[misc]
            for name in (
                "num_steps",
                "num_request_steps",
                "num_draft_tokens",
                "num_accepted_tokens",
                "accepted_per_request_step",
                "accepted_per_verified_row",
                "target_rows",
                "target_rows_decode",
                "draft_rows",
                "draft_forwards",
                "num_preemptions",
            )
        },
        "step_ms": {
            part: middle(lambda d, of=of: of(d) / d["num_steps"])  # type: ignore[misc]
            for part, of in STEP_PARTS.items()
        },
        "accepted_histogram": dict(sorted(accepted.items(), key=lambda n: int(n[0]))),
    }


# How a step's time splits. Drafting's own part is what its models do not take.
STEP_PARTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "target": lambda d: d["target_ms"],
    "draft model": lambda d: d["draft_ms"] + d["draft_logits_ms"],
    "drafting, rest": lambda d: d["propose_ms"] - d["draft_ms"] - d["draft_logits_ms"],
    "rest": lambda d: d["seconds"] * 1e3 - d["target_ms"] - d["propose_ms"],
}


def _tells_saving(rounds: dict[str, list[Round]]) -> bool:
    """Rows of both models were timed, of stock and emssd."""
    return {"stock", "emssd"} <= rounds.keys() and _saw_target(rounds)


def _saw_target(rounds: dict[str, list[Round]]) -> bool:
    """Each forward was timed: on a GPU, those replayed from a full graph are not."""
    return all(
        r.saw_target_forwards and r.target_forwards
        for done in rounds.values()
        for r in done
    )


def saving(batch: int, rounds: dict[str, list[Round]], k: int) -> dict[str, float]:
    """emssd against stock: what the rows saved should earn, and what they did."""
    most_rows = batch * (k + 2)
    draft = [f for s in ("stock", "emssd") for r in rounds[s] for f in r.draft_forwards]
    target = [f for done in rounds.values() for r in done for f in r.target_forwards]
    _, draft_row_ms = row_cost(draft, most_rows)
    _, target_row_ms = row_cost(target, most_rows)
    ours, stock = rounds["emssd"], rounds["stock"]
    num_tokens = median(r.num_tokens for r in ours)
    rows_saved = num_tokens * (
        median(r.draft_rows / r.num_tokens for r in stock)
        - median(r.draft_rows / r.num_tokens for r in ours)
    )
    predicted_s = rows_saved * draft_row_ms / 1e3
    saved_s = num_tokens * (
        median(r.s_per_token for r in stock) - median(r.s_per_token for r in ours)
    )
    forwards_ms = median(r.draft_ms + r.logits_ms for r in ours)
    own_ms = median(r.propose_ms - r.draft_ms - r.logits_ms for r in ours)
    return {
        "draft_row_ms": draft_row_ms,
        "target_row_ms": target_row_ms,
        "row_cost_ratio": draft_row_ms / target_row_ms,
        "draft_rows_saved": rows_saved,
        "predicted_saving_s": predicted_s,
        "saving_s": saved_s,
        "saving_over_predicted": saved_s / predicted_s,
        "bookkeeping_over_forwards": own_ms / forwards_ms,
    }
