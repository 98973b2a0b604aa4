"""From rounds to ratios."""

from __future__ import annotations

import pytest

from vllm_emssd.bench.comparison import (
    compare_all,
    padding,
    ratios,
    speed_ratio,
    spread,
)
from vllm_emssd.bench.round import RequestStep, Round


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


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


def test_automatic_lengths_are_measured_by_the_best_of_vllm_and_of_our_fixed() -> None:
    seconds = {"plain": [4.0], "stock-k3": [2.0], "stock-k5": [8.0], "k2": [3.0]}
    found = ratios(seconds | {"auto": [1.0], "k5": [1.5]})
    assert {title: r["ratio"] for title, r in found.items()} == {
        "stock-k3/plain": 2.0,
        "stock-k5/plain": 0.5,
        "auto/plain": 4.0,
        "k2/plain": pytest.approx(4 / 3),
        "k5/plain": pytest.approx(4 / 1.5),
        "auto/best(stock-k3, stock-k5)": 2.0,
        "auto/best(plain, stock-k3, stock-k5)": 2.0,
        "auto/best(plain, k2, k5)": 1.5,
    }


def test_in_one_engine_the_base_is_no_drafts() -> None:
    lengths = {"k0": [4.0], "k5": [2.0], "k12": [3.0]}
    found = ratios(lengths | {"auto": [1.0], "mixed-auto": [0.5]})
    assert found["auto/best(k0, k5, k12)"]["ratio"] == 2.0
    assert found["mixed-auto/best(k0, k5, k12)"]["ratio"] == 4.0
    assert found["k5/k0"]["ratio"] == 2.0


def test_mixed_is_measured_by_its_proposers_alone() -> None:
    found = ratios({"mixed-auto": [1.0], "auto": [2.0], "llma-auto": [3.0]})
    assert {title: r["ratio"] for title, r in found.items()} == {
        "mixed-auto/best(auto, llma-auto)": 2.0
    }


def test_pairs_that_answer_a_question() -> None:
    found = ratios({"llma": [1.0], "llma-padded": [2.0]})
    assert found["llma/llma-padded"]["ratio"] == 2.0


def one_round(outputs: int = 2) -> Round:
    """Two requests; the second's prompt takes two steps."""
    return Round(
        seconds=2.0,
        num_tokens=7,
        outputs=[[]] * outputs,
        target_forwards=[(15, 4.0), (9, 3.0), (6, 3.0)],
        draft_forwards=[(6, 2.0)],
        logits_ms=1.0,
        propose_ms=9.0,
        emssd_stats={"num_verify_rows": 12},
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


def test_medians_of_what_rounds_counted() -> None:
    slow = one_round()
    slow.seconds = 9.0
    rounds = {2: {"plain": [one_round()] * 2 + [slow], "llma": [one_round()]}}
    (result,) = compare_all(rounds)
    plain = result["methods"]["plain"]
    assert plain["tokens_per_s"] == 3.5
    assert plain["num_request_steps"] == 3
    assert plain["num_draft_tokens"] == 7
    assert plain["num_accepted_tokens"] == 4
    assert plain["accepted_per_request_step"] == pytest.approx(4 / 3)
    assert plain["accepted_histogram"] == {0: 3, 2: 6}
    assert (plain["target_rows"], plain["target_rows_decode"]) == (30, 10)
    assert (plain["draft_rows"], plain["draft_forwards"]) == (6, 1)
    assert plain["emssd_stats"] == {"num_verify_rows": 12}
    assert plain["step_ms"] == pytest.approx(
        {
            "target": 10 / 3,
            "draft model": 3 / 3,
            "drafting, rest": 6 / 3,
            "rest": (2000 - 10 - 9) / 3,
        }
    )
    assert result["ratios"]["llma/plain"]["ratio"] == 1.0


def test_forwards_that_were_not_seen_are_not_counted_as_quick() -> None:
    """On a GPU, those replayed from full graphs."""
    done = one_round()
    done.target_forwards = [(15, 4.0)]
    assert done.target_rows == 30
    assert done.step_ms()["target"] == 0


def test_padding_of_whole_batches() -> None:
    """Of three steps' rows: 4, 3 and 3 unpadded; padded, the last one's 2 are 4."""
    found = padding(2, {"plain": [one_round()], "llma": [one_round()]}, [5, 15])
    rows = {rule: counts["num_rows"] for rule, counts in found["llma"].items()}
    assert found.keys() == {"llma"}
    assert rows == {"unpadded": 10, "padded_inputs": 11, "vanilla": 11}
