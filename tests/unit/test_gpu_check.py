"""scripts/gpu_check without a GPU: what it asks for, and what it does not run again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import gpu_check
from scripts.gpu_check import FEWER, TABLES, Outcomes, of_this_commit, run_table
from vllm_emssd.bench.methods import parse_method
from vllm_emssd.bench.provenance import COMMIT
from vllm_emssd.bench.report import write_result
from vllm_emssd.config import parse_speculative_config


@pytest.fixture(autouse=True)
def of_a_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(COMMIT, "abc1234")
    monkeypatch.setattr(gpu_check, "MODELS", tmp_path)


@pytest.mark.parametrize("name", TABLES)
def test_methods_of_a_table_exist(name: str) -> None:
    methods = [parse_method(text, "DRAFT") for text in TABLES[name].methods]
    assert len({method.name for method in methods}) == len(methods)
    assert {"plain", "emssd", "auto"} <= {method.name for method in methods}
    for method in methods:
        config = method.speculative_config or {}
        if config.get("method") == "emssd":
            parse_speculative_config(config, config)
        if rates := config.get("synthetic_acceptance_rates"):
            assert len(rates) == config["num_speculative_tokens"]


def test_a_table_goes_on_with_fewer_methods_if_it_cannot_begin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output, asked = tmp_path / "table.json", []

    def run(command: list[str], **options: Any) -> Any:
        asked.append(command[command.index("--methods") + 1 :])
        return SimpleNamespace(returncode=int(len(asked[-1]) > len(FEWER)))

    monkeypatch.setattr(subprocess, "run", run)
    assert run_table("8B-1B", output)
    assert [text.partition("=")[0] for text in asked[1]] == list(FEWER)
    config = json.loads((tmp_path / "llama-8B/config.json").read_text())
    assert config["num_hidden_layers"] == 32
    made = {"provenance": {"commit": "abc1234-dirty"}, "results": []}
    for begun in asked[:2]:
        write_result(output, made | {"arguments": {"methods": begun}})
        assert run_table("8B-1B", output) == (begun is asked[1])
        assert asked[-1] == begun, "what is written is not thrown away"
    assert len(asked) == 4


def test_only_tests_that_failed_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "tests.json"
    outcomes = Outcomes(output)
    for name, when, outcome in (
        ("good", "setup", "passed"),
        ("good", "call", "passed"),
        ("left out", "setup", "skipped"),
        ("bad", "call", "failed"),
        ("untidy", "call", "passed"),
        ("untidy", "teardown", "failed"),
    ):
        report = pytest.TestReport(name, ("", 0, ""), {}, outcome, "why", when)
        outcomes.pytest_runtest_logreport(report)
    assert Outcomes(output).ran_before == ["good", "left out"]
    tests = json.loads(output.read_text())["tests"]
    assert [test["outcome"] for test in tests] == [
        *("passed", "skipped", "failed", "failed")
    ]
    monkeypatch.setenv(COMMIT, "def5678")
    assert not of_this_commit(output)
    assert Outcomes(output).ran_before == []
