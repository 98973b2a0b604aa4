"""From rounds to ratios."""

from __future__ import annotations

import math

import pytest

from vllm_emssd.bench.comparison import (
    compare,
    geometric_means,
    ratios,
    speed_ratio,
    spread,
)
from vllm_emssd.bench.harness import Plan, in_batches
from vllm_emssd.bench.machine_speed import slowness
from vllm_emssd.bench.methods import Method
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import RequestStep, Round
from vllm_emssd.bench.row_costs import row_cost


def test_equal_rounds_leave_no_doubt() -> None:
    ratio = speed_ratio([2.0] * 5, [[3.0] * 5])
    assert (ratio.ratio, ratio.low, ratio.high) == (1.5, 1.5, 1.5)


def test_a_disturbed_round_is_disturbed_for_all() -> None:
    """Rounds are resampled together, so what slows both changes no ratio."""
    ours = [1.0, 1.0, 4.0, 1.0, 2.0]
    ratio = speed_ratio(ours, [[2 * s for s in ours]])
    assert ratio.low == ratio.ratio == ratio.high == 2.0


def test_interval_holds_the_ratio_and_grows_with_noise() -> None:
    steady = speed_ratio([1.0, 1.01, 0.99, 1.0, 1.02], [[2.0, 2.0, 2.01, 1.99, 2.0]])
    noisy = speed_ratio([1.0, 1.5, 0.7, 1.1, 0.9], [[2.0, 2.9, 1.3, 2.0, 2.2]])
    for ratio in (steady, noisy):
        assert ratio.low <= ratio.ratio <= ratio.high
    assert noisy.high - noisy.low > 5 * (steady.high - steady.low)


def test_against_the_better_of_two() -> None:
    assert speed_ratio([1.0] * 3, [[4.0] * 3, [2.0] * 3]).ratio == 2.0


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


def test_which_ratios() -> None:
    seconds = {name: [1.0, 1.0] for name in ("plain", "stock", "auto", "emssd")}
    assert set(ratios(seconds)) == {
        "stock/plain",
        "auto/plain",
        "emssd/plain",
        "emssd/stock",
        "auto/emssd",
        "auto/best(plain, stock)",
    }


def test_the_best_length_is_what_auto_is_measured_by() -> None:
    seconds = {"auto": [1.0], "k0": [4.0], "k5": [2.0], "k12": [3.0]}
    found = ratios(seconds)
    assert found["auto/best(k0, k5, k12)"]["ratio"] == 2.0
    assert found["k5/k0"]["ratio"] == 2.0
    with_plain = ratios({"auto": [1.0], "plain": [0.5], "k5": [2.0]})
    assert with_plain["auto/best(plain, k5)"]["ratio"] == 0.5


def test_mixed_is_measured_by_its_proposers_alone() -> None:
    found = ratios({"mixed-auto": [1.0], "auto": [2.0], "llma-auto": [3.0]})
    assert {title: r["ratio"] for title, r in found.items()} == {
        "mixed-auto/auto": 2.0,
        "mixed-auto/llma-auto": 3.0,
        "mixed-auto/best(auto, llma-auto)": 2.0,
    }


def test_geometric_means() -> None:
    results = [{"ratios": {"a/b": {"ratio": r}}} for r in (1.0, 4.0)]
    assert geometric_means(results) == {"a/b": pytest.approx(2.0)}


def test_row_cost_of_a_line() -> None:
    forwards = [(rows, 3.0 + 0.5 * rows) for rows in (2, 4, 9)] * 3
    assert row_cost(forwards, most_rows=9) == pytest.approx((3.0, 0.5))


def test_row_cost_ignores_prompts_and_rarities() -> None:
    forwards = [(rows, 3.0 + 0.5 * rows) for rows in (2, 4)] * 3
    assert row_cost([*forwards, (6, 99.0), *[(500, 1.0)] * 5], 9) == pytest.approx(
        (3.0, 0.5)
    )


def test_row_cost_needs_two_row_counts() -> None:
    assert all(math.isnan(value) for value in row_cost([(2, 1.0)] * 5, 9))


def one_round() -> Round:
    """Two requests; the second's prompt takes two steps."""
    return Round(
        seconds=2.0,
        num_tokens=7,
        target_forwards=[(15, 4.0), (9, 3.0), (6, 3.0)],
        steps=[
            [RequestStep(0, 5, 0, 1), RequestStep(1, 10, 0, 0)],
            [RequestStep(0, 4, 3, 3), RequestStep(1, 5, 0, 1)],
            [RequestStep(0, 3, 2, 1), RequestStep(1, 3, 2, 3)],
        ],
    )


def test_prompts_are_no_request_steps() -> None:
    assert one_round().decode_steps() == [
        RequestStep(0, 4, 3, 3),
        RequestStep(0, 3, 2, 1),
        RequestStep(1, 3, 2, 3),
    ]


def test_round_counts() -> None:
    counts = one_round().as_dict()
    assert counts["num_request_steps"] == 3
    assert counts["num_draft_tokens"] == 7
    assert counts["num_accepted_tokens"] == 4
    assert counts["accepted_per_request_step"] == pytest.approx(4 / 3)
    assert counts["accepted_histogram"] == {"0": 1, "2": 2}
    assert counts["drafted_histogram"] == {"2": 2, "3": 1}
    assert counts["target_rows"] == 30
    assert counts["target_rows_decode"] == 10


def test_compare_one_batch() -> None:
    result = compare(2, {"plain": [one_round()], "llma": [one_round()]}, k=5)
    assert result["methods"]["llma"]["tokens_per_s"] == 3.5
    assert result["methods"]["llma"]["step_ms"]["target"] == pytest.approx(10 / 3)
    assert result["methods"]["llma"]["step_ms"]["rest"] == pytest.approx(1990 / 3)
    assert result["ratios"]["llma/plain"]["ratio"] == 1.0
    assert result["saving"] is None


def rounds_of(
    rows: list[int], own_ms: float, slowness: list[float], rarity_ms: float = 0.0
) -> list[Round]:
    """Of 40 tokens each: forwards of 30 ms and 1 a row, and `own_ms` besides."""
    done = []
    for slow in slowness:
        forwards = [(n, slow * (30.0 + n)) for n in rows * 10]
        forwards[0] = (forwards[0][0], forwards[0][1] + rarity_ms)
        ms = sum(took for _, took in forwards) + slow * own_ms
        steps = [[RequestStep(0, n, 0, 1)] for n, _ in forwards]
        done.append(Round(ms / 1e3, 40, target_forwards=forwards, steps=steps))
    return done


def test_a_slow_minute_is_told_from_a_slow_method() -> None:
    """What a method has to pay alone, such as a first forward, stays its own."""
    rounds = {
        "plain": rounds_of([10, 20, 40], 0, [1, 2, 1, 2, 2, 1]),
        "auto": rounds_of([12, 20, 44], 300, [2, 1, 1, 1, 2, 1], rarity_ms=200),
    }
    slow = slowness(rounds)
    low, high = slow["plain"][:2]
    assert slow["plain"] == pytest.approx([low, high, low, high, high, low])
    assert high / low == pytest.approx(2)
    result = compare(2, rounds, k=5, in_one_engine=True)
    found = result["at_equal_speed"]["auto/plain"]
    wanted = 1600 / (1660 + 300 + 200)
    assert found["ratio"] == pytest.approx(wanted, rel=0.05)
    assert found["high"] - found["low"] < 0.1
    assert result["ratios"]["auto/plain"]["high"] > 1.2
    assert compare(2, rounds, k=5)["at_equal_speed"] is None
    rounds["auto"][0].target_forwards = []  # as from full graphs, on a GPU
    assert compare(2, rounds, k=5, in_one_engine=True)["at_equal_speed"] is None


def test_saving_over_stock() -> None:
    """2 s at 10 rows of 100 ms on stock, 1.2 s at 4 rows on ours: 0.8 of 0.6 s."""

    def drafting(seconds: float, rows: list[int], propose_ms: float) -> Round:
        done = one_round()
        done.seconds, done.propose_ms = seconds, propose_ms
        done.draft_forwards = [(n, 10.0 + 100.0 * n) for n in rows]
        done.target_forwards = [(n, 200.0 * n) for n in (1, 2)] * 3
        return done

    rounds = {
        "stock": [drafting(2.0, [3, 3, 4], 1030.0)] * 3,
        "emssd": [drafting(1.2, [1, 3], 480.0)] * 3,
    }
    saving = compare(2, rounds, k=5)["saving"]
    assert saving["draft_rows_saved"] == 6
    assert saving["row_cost_ratio"] == pytest.approx(0.5)
    assert saving["predicted_saving_s"] == pytest.approx(0.6)
    assert saving["saving_over_predicted"] == pytest.approx(0.8 / 0.6)
    assert saving["bookkeeping_over_forwards"] == pytest.approx(60 / 420)


def test_whole_batches() -> None:
    plan = Plan([Method("plain", None)], [1, 4, 24], rounds=3, min_requests=6)
    assert [plan.num_requests(batch) for batch in plan.batches] == [6, 8, 24]
    assert plan.most_requests() == 24
    requests = [Request([1], 1, {}, source=str(i)) for i in range(8)]
    batches = in_batches(requests, 4)
    assert [[r.source for r in batch] for batch in batches] == [
        list("0123"),
        list("4567"),
    ]
