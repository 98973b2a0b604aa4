"""Cost files: what they say, and bad ones refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.made_traces import straight_costs
from vllm_emssd.simulate.costs import load_costs, shipped_costs


def test_shipped_tables_say_where_they_were_measured() -> None:
    assert shipped_costs()
    for name in shipped_costs():
        assert {"machine", "command"} <= load_costs(name).provenance.keys()


def test_fixed_cost_by_requests() -> None:
    costs = straight_costs(speculation_ms=0.5)
    assert costs.fixed_ms(4, speculates=False) == pytest.approx(5.0)
    assert costs.fixed_ms(4, speculates=True) == pytest.approx(5.5)
    per_step = costs.step_costs(4)
    assert (per_step.fixed_ms, per_step.speculation_ms) == pytest.approx((5.0, 0.5))
    assert per_step.draft.points == [(1, 1.0), (1000, 1000.0)]


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="cpu-2core-epyc"):
        load_costs("h1000")


@pytest.mark.parametrize(
    ("values", "message"),
    [
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
