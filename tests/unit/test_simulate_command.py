"""`vllm-emssd simulate`, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fresh_process import python
from tests.unit.made_traces import random_trace, straight_costs
from vllm_emssd.cli import main
from vllm_emssd.simulate.traces import SHIPPED_TRACE, load_trace, save_trace


def test_shipped_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    limits = ["--max-concurrency", "2", "8", "--fixed", "2", "--output-len", "12"]
    limits += ["--num-prompts", "1", "--output-json", str(output)]
    assert main(["simulate", "predict", *limits]) == 0
    shown = capsys.readouterr().out
    assert "predicted tokens/s" in shown
    written = json.loads(output.read_text())
    assert written["trace"]["draft"]
    assert written["costs"]["provenance"]["machine"]
    results = written["results"]
    methods = ["plain", "fixed 2", "padded 5", "auto"]
    assert [(r["batch"], r["method"]) for r in results] == [
        (batch, method) for batch in (2, 8) for method in methods
    ]
    for r in results:
        assert 12 <= r["num_tokens"] / r["batch"] < 2 * 12
        assert r["tokens_per_s"] == pytest.approx(r["num_tokens"] / r["ms"] * 1e3)
        assert f"{r['tokens_per_s']:.0f} (" in shown
        assert (r["policy_ms_per_step"] > 0) == (r["method"] != "plain")
    assert "deciding the lengths took" in shown
    accepted = {r["method"]: r["counters"]["num_accepted_tokens"] for r in results}
    assert accepted["plain"] == 0
    assert accepted["padded 5"] > accepted["fixed 2"] > 0


def test_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    save_trace(random_trace(0, k=2), path)
    given = ["simulate", "predict", "--trace", str(path), "--bounds", "--fixed", "1"]
    given += ["--padded", "2", "--max-concurrency", "2"]
    for proposer in ("draft_model", "llma"):
        assert main([*given, "--proposer", proposer]) == 0
        shown = capsys.readouterr().out
        assert "over the best fixed length" in shown
        assert ("padded" in shown) == (proposer == "draft_model")


def test_shipped_trace_is_small_and_whole() -> None:
    assert SHIPPED_TRACE.stat().st_size < 300_000
    shipped = load_trace(SHIPPED_TRACE)
    assert len(shipped.requests) >= 24
    assert shipped.header.k >= 8
    assert all(len(r.accepted) >= 128 for r in shipped.requests)


def test_needs_no_vllm(tmp_path: Path) -> None:
    trace, costs = tmp_path / "t.jsonl", tmp_path / "costs.json"
    save_trace(random_trace(0, k=8), trace)
    costs.write_text(straight_costs().model_dump_json())
    code = (
        "import sys\n"
        "sys.modules['vllm'] = sys.modules['transformers'] = None\n"
        "from vllm_emssd.cli import main\n"
        f"sys.exit(main(['simulate', 'predict', '--trace', {str(trace)!r}, '--costs',"
        f" {str(costs)!r}, '--max-concurrency', '2']))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "padded 5" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--costs", "nowhere"], "cpu-2core-epyc"),
        (["--fixed", "200"], "record more"),
    ],
)
def test_errors_name_the_fix(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "predict", *options]) == 1
    assert message in capsys.readouterr().err
