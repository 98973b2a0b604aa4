"""`vllm-emssd bench latency` end to end: counts alone, never times."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fresh_process import python

METHODS = ("plain", "emssd", "llma")
BATCHES = (1, 3)
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "result.json"
    options = f"--input-len 256 --output-len {MAX_TOKENS} --kv-cache-memory-bytes 64M"
    options += " --num-iters 1 --num-iters-warmup 0 --no-enable-prefix-caching"
    command = ["-m", "vllm_emssd", "bench", "latency", *options.split()]
    command += ["--methods", *METHODS, "--batch-size", *map(str, BATCHES)]
    command += ["--enforce-eager", "--output-json", str(path)]
    done = python(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def counts_of(result: dict[str, Any], method: str) -> list[tuple[int, dict[str, Any]]]:
    """By requests at once: the medians of one round are its own counts."""
    return [(one["batch"], one["methods"][method]) for one in result["results"]]


@pytest.mark.parametrize("method", METHODS)
def test_every_request_is_decoded(result: dict[str, Any], method: str) -> None:
    for batch, counts in counts_of(result, method):
        assert counts["num_tokens"] == batch * MAX_TOKENS
        assert counts["num_preemptions"] == 0
        emitted = counts["num_request_steps"] + counts["num_accepted_tokens"] + batch
        assert emitted >= counts["num_tokens"]


def test_plain_drafts_nothing(result: dict[str, Any]) -> None:
    for batch, counts in counts_of(result, "plain"):
        assert counts["num_draft_tokens"] == counts["draft_rows"] == 0
        assert counts["num_request_steps"] == batch * (MAX_TOKENS - 1)
        assert counts["emssd_stats"] == {}


@pytest.mark.parametrize("method", ["emssd", "llma"])
def test_the_plugin_counts_alike(result: dict[str, Any], method: str) -> None:
    """What was seen at the scheduler and the models is what the plugin says."""
    for batch, counts in counts_of(result, method):
        stats = counts["emssd_stats"]
        assert counts["num_draft_tokens"] == stats["num_draft_tokens"] > 0
        assert counts["num_accepted_tokens"] == stats["num_accepted_tokens"] > 0
        assert counts["num_request_steps"] + batch == stats["num_request_steps"]
        assert counts["draft_rows"] == stats["num_draft_rows"]
        assert counts["target_rows_decode"] + batch == stats["num_verify_rows"]


def test_fewer_steps_for_the_same_tokens(result: dict[str, Any]) -> None:
    plain, llma = counts_of(result, "plain"), counts_of(result, "llma")
    for (_, without), (_, copied) in zip(plain, llma, strict=True):
        assert copied["num_request_steps"] < without["num_request_steps"]


def test_padding_is_that_of_the_plugin(result: dict[str, Any]) -> None:
    """The replay's rows are what the engine's own counters say of a padded batch."""
    for one in result["results"]:
        for method in ("emssd", "llma"):
            batch, stats = one["batch"], one["methods"][method]["emssd_stats"]
            padding = one["padding"][method]
            unpadded, padded = padding["unpadded"], padding["padded_inputs"]
            assert unpadded["num_rows"] + batch == stats["num_verify_rows"]
            assert padded["num_rows"] + batch == stats["num_padded_verify_rows"]
            assert padding["vanilla"]["num_rows"] == padded["num_rows"]


def test_result_says_where_it_comes_from(result: dict[str, Any]) -> None:
    assert result["provenance"]["vllm"]
    assert "bench latency" in result["provenance"]["command"]
    assert result["is_compiled"] is False
    assert result["arguments"]["num_iters"] == 1
    assert result["workload"]["max_tokens"]["least"] == MAX_TOKENS
    assert result["workload"]["num_requests"] == max(BATCHES)
    assert [r["batch"] for r in result["results"]] == list(BATCHES)
    assert "llma/plain" in result["results"][0]["ratios"]
