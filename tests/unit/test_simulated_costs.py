"""Cost files: the shipped rooflines are what is computed; bad files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.made_traces import straight_costs
from vllm_emssd.simulate.costs import load_costs, shipped_costs
from vllm_emssd.simulate.learned_costs import costs_of_result
from vllm_emssd.simulate.roofline import (
    H100,
    LLAMA_70B,
    OPT_6_7B,
    TABLES,
    context_ms,
    forward_ms,
    roofline,
)


@pytest.mark.parametrize("name", TABLES)
def test_shipped_roofline_is_what_is_computed(name: str) -> None:
    shipped = load_costs(name)
    assert shipped == roofline(*TABLES[name])
    assert shipped.kind == "computed"
    assert "nothing was measured" in shipped.provenance["note"]


def test_measured_tables_say_where() -> None:
    measured = [load_costs(n) for n in shipped_costs() if n not in TABLES]
    assert measured
    for costs in measured:
        assert costs.kind == "measured"
        assert {"machine", "command"} <= costs.provenance.keys()


def test_few_rows_cost_the_weights_and_many_the_arithmetic() -> None:
    weights_ms = 2 * 6.66e9 / (0.8 * 3.35e12) * 1e3
    assert forward_ms(H100, OPT_6_7B, 1, 1) == pytest.approx(weights_ms)
    assert forward_ms(H100, OPT_6_7B, 1, 64) == pytest.approx(weights_ms)
    arithmetic_ms = 2 * 6.66e9 * 1024 / (0.6 * 989e12) * 1e3
    assert forward_ms(H100, OPT_6_7B, 1, 1024) == pytest.approx(arithmetic_ms)


def test_four_gpus_share_the_weights_and_talk() -> None:
    weights_ms = 2 * 69.5e9 / (0.8 * 3.35e12) * 1e3 / 4
    talk_ms = 2 * 80 * (10e-6 + 1.5 * 2 * 8192 / 450e9) * 1e3
    assert forward_ms(H100, LLAMA_70B, 4, 1) == pytest.approx(weights_ms + talk_ms)


def test_context_of_a_request() -> None:
    size = 1024 * 2 * 32 * 4096 * 2
    assert context_ms(H100, OPT_6_7B, 1) == pytest.approx(size / (0.8 * 3.35e12) * 1e3)


def test_fixed_cost_by_requests() -> None:
    costs = straight_costs(speculation_ms=0.5)
    assert costs.fixed_ms(4, speculates=False) == pytest.approx(5.0)
    assert costs.fixed_ms(4, speculates=True) == pytest.approx(5.5)
    prices = costs.step_costs(4, drafts_are_free=False)
    assert (prices.fixed_ms, prices.speculation_ms) == pytest.approx((5.0, 0.5))
    assert costs.step_costs(4, drafts_are_free=True).fixed_ms == pytest.approx(5.5)
    assert prices.draft.points == [(1, 1.0), (1000, 1000.0)]
    assert costs.step_costs(4, drafts_are_free=True).draft.points == [(1, 0.0)]


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="h100-llama-70b-1b"):
        load_costs("h1000")


def bench_result() -> dict[str, Any]:
    """Steps of 3 ms besides the forwards, and one more with drafts."""

    def method(step_ms: dict[str, float], draft_forwards: int) -> dict[str, Any]:
        return {
            "num_steps": 10,
            "draft_forwards": draft_forwards,
            "draft_rows": 4 * draft_forwards,
            "step_ms": step_ms,
        }

    plain = {"target": 9.0, "draft model": 0.0, "drafting, rest": 0.0, "rest": 3.0}
    auto = {"target": 9.0, "draft model": 7.0, "drafting, rest": 2.0, "rest": 3.0}
    names = ("machine", "command", "commit", "vllm", "torch")
    return {
        "provenance": dict.fromkeys(names, "here"),
        "arguments": {"model": "TARGET", "draft_model": "DRAFT"},
        "results": [
            {
                "batch": batch,
                "methods": {"plain": method(plain, 0), "auto": method(auto, 20)},
            }
            for batch in (8, 1)
        ],
        "costs": {"target": [[1, 9.0], [8, 9.5]], "draft": [[1, 1.0], [7, 7.0]]},
    }


def test_costs_are_learned_from_medians() -> None:
    """Two draft forwards a step of four rows, 4 ms each, are not part of the rest."""
    costs = costs_of_result(bench_result())
    assert costs.fixed == [(1, 3.0), (8, 3.0)]
    assert costs.speculation_ms == pytest.approx(7 + 2 + 3 - 2 * 4 - 3)
    assert costs.target.points == [(1, 9.0), (8, 9.5)]
    assert (costs.target.model, costs.draft.model) == ("TARGET", "DRAFT")
    assert costs.provenance["machine"] == "here"


@pytest.mark.parametrize("missing", ["costs", "plain"])
def test_costs_need_plain_and_auto(missing: str) -> None:
    result = bench_result()
    if missing == "costs":
        result["costs"] = {}
    else:
        del result["results"][0]["methods"]["plain"]
    with pytest.raises(ValueError, match="methods plain and auto"):
        costs_of_result(result)


def test_kept_result_has_the_costs_that_were_shipped() -> None:
    """`cpu-2core-epyc` names the file it was learned from."""
    root = Path(__file__).parents[2]
    shipped = load_costs("cpu-2core-epyc")
    source = root / shipped.provenance["command"].split()[-1]
    learned = costs_of_result(json.loads(source.read_text()))
    assert [n for n, _ in learned.fixed] == [n for n, _ in shipped.fixed]
    for (_, ours), (_, theirs) in zip(learned.fixed, shipped.fixed, strict=True):
        assert ours == pytest.approx(theirs, abs=0.002)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "guessed"}, "kind"),
        ({"provenance": {}}, "provenance"),
        ({"fixed": [(2, 1.0), (1, 2.0)]}, "rise"),
        ({"target": {"model": "x", "points": []}}, r"target\.points"),
        ({"draft": {"model": "x", "points": [(4, 1.0), (4, 2.0)]}}, "rise"),
        ({"draft": {"model": "x", "points": [(0, 1.0)]}}, r"draft\.points"),
        ({"target": {"model": "x", "points": [(1, -1.0)]}}, r"target\.points"),
        ({"speculation_ms": -1}, "speculation_ms"),
        ({"more": 1}, "more"),
    ],
)
def test_malformed(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(straight_costs().model_dump() | values))
    with pytest.raises(ValueError, match=rf"costs\.json is no cost table.*{message}"):
        load_costs(str(file))
