"""Cost files: the shipped rooflines are what is computed; bad files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.made_traces import straight_costs
from vllm_emssd.bench.costs import load_costs, shipped_costs
from vllm_emssd.bench.roofline import (
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
