"""`vllm-emssd bench --quick` end to end: counts alone, never times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

METHODS = ("plain", "emssd", "llma")
BATCHES = (1, 3)
MAX_TOKENS = 24
K = 5


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    path, rounds_path = folder / "result.json", folder / "rounds.json"
    command = [sys.executable, "-m", "vllm_emssd", "bench", "--quick"]
    command += ["--methods", *METHODS, "--batches", *map(str, BATCHES)]
    command += ["--max-tokens", str(MAX_TOKENS), "--rounds", "1"]
    command += ["--workload", "mixed", "--max-prompt-tokens", "256"]
    command += ["--kv-cache-mib", "64", "--output", str(path)]
    command += ["--save-rounds", str(rounds_path)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    every_round = json.loads(rounds_path.read_text())
    return json.loads(path.read_text()) | {"every_round": every_round}


def rounds(result: dict[str, Any], method: str) -> list[tuple[int, dict[str, Any]]]:
    every_round = result["every_round"]["rounds"]
    return [(batch, every_round[str(batch)][method][0]) for batch in BATCHES]


@pytest.mark.parametrize("method", METHODS)
def test_every_request_is_decoded(result: dict[str, Any], method: str) -> None:
    for batch, counts in rounds(result, method):
        assert counts["num_tokens"] == batch * MAX_TOKENS
        assert counts["num_preemptions"] == 0
        emitted = counts["num_request_steps"] + counts["num_accepted_tokens"] + batch
        assert emitted >= counts["num_tokens"]
        assert counts["target_forwards"] == counts["num_steps"]


def test_plain_drafts_nothing(result: dict[str, Any]) -> None:
    for batch, counts in rounds(result, "plain"):
        assert counts["num_draft_tokens"] == counts["draft_rows"] == 0
        assert counts["num_request_steps"] == batch * (MAX_TOKENS - 1)
        assert counts["emssd_stats"] == {}


@pytest.mark.parametrize("method", ["emssd", "llma"])
def test_the_plugin_counts_alike(result: dict[str, Any], method: str) -> None:
    """What the harness saw at the scheduler is what the plugin says."""
    for batch, counts in rounds(result, method):
        stats = counts["emssd_stats"]
        assert counts["num_draft_tokens"] == stats["num_draft_tokens"] > 0
        assert counts["num_accepted_tokens"] == stats["num_accepted_tokens"] > 0
        assert counts["num_request_steps"] + batch == stats["num_request_steps"]
        assert counts["draft_rows"] == stats["num_draft_rows"]
        assert counts["target_rows_decode"] + batch == stats["num_verify_rows"]
        longest = max(map(int, counts["drafted_histogram"]))
        assert longest == (K if method == "emssd" else 7)


def test_same_tokens_fewer_steps(result: dict[str, Any]) -> None:
    for (_, plain), (_, llma) in zip(
        rounds(result, "plain"), rounds(result, "llma"), strict=True
    ):
        assert llma["num_request_steps"] < plain["num_request_steps"]


def test_result_says_where_it_comes_from(result: dict[str, Any]) -> None:
    assert result["provenance"]["vllm"]
    assert "--quick" in result["provenance"]["command"]
    assert result["arguments"]["rounds"] == 1
    assert result["workload"]["max_tokens"]["least"] == MAX_TOKENS
    assert result["workload"]["num_requests"] == max(BATCHES)
    workload = result["every_round"]["workload"]
    assert workload["max_tokens"] == [MAX_TOKENS] * max(BATCHES)
    assert len(workload["num_prompt_tokens"]) == max(BATCHES)
    assert "rounds" not in result
    assert [r["batch"] for r in result["results"]] == list(BATCHES)
    assert "llma/plain" in result["geometric_means"]
