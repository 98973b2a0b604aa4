"""The bench command around its engines: what it asks for, writes, prints and draws."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.unit.test_workloads import Words
from vllm_emssd import cli
from vllm_emssd.bench import smollm2
from vllm_emssd.bench.comparison import compare_all
from vllm_emssd.bench.engine_process import EngineError, EngineOptions
from vllm_emssd.bench.harness import Plan
from vllm_emssd.bench.methods import Method
from vllm_emssd.bench.over_http import (
    KEPT,
    load_command,
    serve_command,
    summaries,
    write_prompts,
)
from vllm_emssd.bench.plots import draw_speed_up, label_of
from vllm_emssd.bench.provenance import COMMIT, commit, provenance
from vllm_emssd.bench.report import print_results, write_result
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import RequestStep, Round
from vllm_emssd.commands import bench


def result() -> dict[str, Any]:
    """Two methods; llma accepts 1 and 3 drafts and is twice as fast at batch 8."""

    def rounds(s_per_token: float, sampled: int) -> list[Round]:
        num_tokens = 1 + sampled
        prompt = [RequestStep(0, 9, 0, 1)]
        step = [RequestStep(0, sampled, sampled - 1, sampled)]
        return [
            Round(
                seconds=s_per_token * num_tokens,
                num_tokens=num_tokens,
                target_forwards=[(9, 1.0), (sampled, 2.0)],
                steps=[prompt, step],
            )
            for _ in range(3)
        ]

    return {
        "provenance": provenance(),
        "is_compiled": True,
        "workload": {"name": "edit"},
        "results": compare_all(
            {
                1: {"plain": rounds(0.5, 1), "llma": rounds(0.5, 2)},
                8: {"plain": rounds(0.5, 1), "llma": rounds(0.25, 4)},
            }
        ),
    }


def test_plot_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table2.json"
    write_result(path, result())
    assert cli.main(["plot", str(path), "-o", str(tmp_path / "figures")]) == 0
    figure = tmp_path / "figures/table2-speed-up.png"
    assert capsys.readouterr().out.splitlines() == [str(figure)]
    assert figure.stat().st_size > 5000


def test_figure_of_several_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{name}.json" for name in ("a", "b", "c", "d")]
    for path in paths:
        write_result(path, result() | {"arguments": {"dtype": "float32"}})
    command = ["plot", *map(str, paths), "--side-by-side", "all", "-o", str(tmp_path)]
    assert cli.main(command) == 0
    figure = tmp_path / "all-speed-up.png"
    assert capsys.readouterr().out.splitlines() == [str(figure)]
    assert imread(figure).shape[:2] == (1020, 1890)  # two rows of three panels


def test_plot_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert cli.main(["plot", str(path), "-o", str(tmp_path)]) == 1
    assert "no result of vllm-emssd bench" in capsys.readouterr().err
    assert cli.main(["plot", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_what_is_drawn() -> None:
    axes = Figure().subplots()
    draw_speed_up(axes, result())
    (line,) = axes.containers
    assert line.lines[0].get_ydata().tolist() == [1.0, 2.0]


def test_figures_say_whose_method_it_is() -> None:
    names = ("stock", "stock-k3", "ngram-longest", "llma", "k3", "mine")
    assert [label_of(name) for name in names] == [
        "vLLM draft_model",
        "vLLM draft_model, k3",
        "vLLM ngram, longest",
        "emssd llma",
        "emssd fixed 3",
        "mine",
    ]


def test_result_file_is_small_and_whole(tmp_path: Path) -> None:
    """A method's medians are one line; what is read back is what was written, but for
    digits that no measurement has."""
    path = tmp_path / "folder" / "result.json"
    made = result()
    write_result(path, made | {"nothing": math.nan, "third": 1 / 3})
    lines = path.read_text().splitlines()
    medians = [line for line in lines if '"tokens_per_s"' in line]
    assert medians
    assert all('"accepted_histogram"' in line for line in medians)
    assert len(lines) < 20
    read = json.loads(path.read_text())
    assert read.pop("nothing") is None
    assert read.pop("third") == 0.33333
    assert read["provenance"]["commit"] == made["provenance"]["commit"]
    first, second = read["results"]
    assert first["methods"]["llma"]["accepted_histogram"] == {"1": 3}
    assert second["methods"]["llma"]["num_rounds"] == 3
    assert second["ratios"]["llma/plain"] == {"ratio": 2.0, "low": 2.0, "high": 2.0}


def test_printing_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    made = result()["results"]
    print_results(made)
    printed = capsys.readouterr().out
    assert "llma/plain" in printed
    assert "2 (2.00)" not in printed
    assert "4 (2.00)" in printed
    assert "TTFT" not in printed
    assert "preempted" not in printed
    made[0]["methods"]["llma"]["num_preemptions"] = 1
    counts = {"num_rows": 10, "num_kv_slots": 10}
    padded = {"num_rows": 21, "num_kv_slots": 13}
    made[0]["padding"] = {"llma": {"unpadded": counts, "vanilla": padded}}
    made[1]["padding"] = {}
    print_results(made)
    printed = capsys.readouterr().out
    assert "preempted" in printed
    assert "2.10" in printed
    assert "1.30" in printed


def test_provenance_names_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    made = provenance()
    assert made["vllm"].startswith("0.")
    assert made["commit"]
    assert made["command"]
    assert "/" not in (made["environment"]["LD_PRELOAD"] or "")
    assert "cores" in made["machine"]
    monkeypatch.setenv(COMMIT, "abc1234")
    assert commit(Path("/")) == "abc1234"
    monkeypatch.delenv(COMMIT)
    assert commit(Path("/")) == ""


# ---------------------------------------------------------------- over HTTP


def test_server_of_a_method() -> None:
    """Is asked for what an engine is."""
    args = {"model": "TARGET", "max_model_len": 640, "enforce_eager": False}
    options = EngineOptions(args | {"enable_prefix_caching": True})
    config = {"method": "emssd"}
    command = serve_command(Method("llma", config), options, port=1234)
    assert command[1:] == [
        *["serve", "TARGET", "--port", "1234", "--max-model-len", "640"],
        *["--no-enforce-eager", "--enable-prefix-caching"],
        *["--speculative-config", json.dumps(config)],
    ]
    plain = serve_command(Method("plain", None), options, port=1234)
    assert plain == command[: len(plain)] == command[:-2]


def test_load_is_greedy_and_of_the_dataset(tmp_path: Path) -> None:
    words = Words()
    requests = [
        Request(words.encode(text), n, {"temperature": 0.0})
        for text, n in (("a b", 5), ("c d e", 6))
    ]
    prompts = write_prompts(tmp_path / "prompts.jsonl", requests, words)
    assert [json.loads(line) for line in prompts.read_text().splitlines()] == [
        {"prompt": "a b", "output_tokens": 5},
        {"prompt": "c d e", "output_tokens": 6},
    ]
    args = {"model": "TARGET", "tokenizer": "TOKENIZER"}
    command = load_command("http://here", args, requests, prompts, 2)
    assert "--temperature=0.0" in command
    assert command[command.index("--max-concurrency") + 1] == "2"
    assert command[command.index("--num-prompts") + 1] == "2"


def test_load_of_mixed_sampling_is_refused(tmp_path: Path) -> None:
    requests = [Request([1], 1, {"temperature": t}) for t in (0.0, 1.0)]
    with pytest.raises(ValueError, match="bench throughput"):
        load_command("http://here", {}, requests, tmp_path, 1)


def test_http_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = {
        4: {
            name: [dict.fromkeys(KEPT, scale * value) for value in (1.0, 9.0, 2.0)]
            for name, scale in (("plain", 1), ("auto", 3))
        }
    }
    (found,) = summaries(rounds)
    assert found["batch"] == 4
    assert found["methods"]["plain"]["tokens_per_s"] == 2
    assert found["methods"]["auto"]["p99_itl_ms"] == 6
    assert found["ratios"]["auto/plain"]["ratio"] == pytest.approx(3)
    print_results([found])
    assert "first token" in capsys.readouterr().out


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("verb", "flag"), [("throughput", "--max-concurrency"), ("latency", "--batch-size")]
)
def test_verb_says_how_requests_follow(verb: str, flag: str) -> None:
    args = parsed(verb, flag, "2", "4", "--num-iters", "3", "--methods", "plain", "k2")
    plan = bench.plan_of(args)
    assert plan.batches == [2, 4]
    assert plan.rounds == 3
    assert plan.is_continuous == (verb == "throughput")
    assert [method.name for method in plan.methods] == ["plain", "k2"]


def test_verb_lengths_is_one_engine() -> None:
    plan = bench.plan_of(parsed("lengths"))
    assert plan.host is not None
    assert plan.host.name == "auto"
    assert all(method.setting for method in plan.methods)
    with pytest.raises(ValueError, match="of 'lengths' only"):
        bench.plan_of(parsed("throughput", "--methods", "plain", "k0"))


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*arguments])


def test_sizes_as_vllm_reads_them() -> None:
    sizes = {"512M": 512 << 20, "2G": 2 << 30, "1K": 1024, "77": 77}
    for text, size in sizes.items():
        found = parsed("serve", "--kv-cache-memory-bytes", text)
        assert found.kv_cache_memory_bytes == size


def test_sigterm_ends_a_bench_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what it started, in `with` blocks, ends too."""
    before = signal.getsignal(signal.SIGTERM)
    ended = []

    def compare(args: object) -> list[object]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            ended.append(True)
        return []

    monkeypatch.setattr(bench, "_compare", compare)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["bench", "throughput", "--model", "TARGET"])
    assert ended == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_was_cut_off_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the numbers of requests that it had not got to; not at another commit."""
    asked: list[list[int]] = []

    def measure(plan: Plan, engine: Any, requests: Any, keep: Any) -> None:
        asked.append(list(plan.batches))
        for batch in plan.batches[:2]:
            keep(batch, {method.name: [Round(1.0, 4)] for method in plan.methods})
        if len(plan.batches) > 2:
            raise EngineError("cut off")

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setenv(COMMIT, "abc1234")
    path, at_once = tmp_path / "result.json", ["--max-concurrency", "1", "2", "4"]
    command = ["bench", "throughput", "--methods", "plain", "llma", *at_once]
    command += ["--output-json", str(path)]
    assert [cli.main(command) for _ in range(3)] == [1, 0, 0]
    assert asked == [[1, 2, 4], [4]]
    found = json.loads(path.read_text())["results"]
    assert [result["batch"] for result in found] == [1, 2, 4]
    assert cli.main([*command, "--num-iters", "9"]) == 1
    monkeypatch.setenv(COMMIT, "def5678")
    assert cli.main([*command, "--num-iters", "9"]) == 1
    assert asked[2:] == [[1, 2, 4], [1, 2, 4]]


@pytest.mark.parametrize("verb", ["throughput", "latency", "serve"])
def test_defaults_of_an_installed_package(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A chat model that is fetched, chats, and methods without a draft model."""
    fetched: list[bool] = []
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(bench, "SHIPPED_MODELS", tmp_path / "models")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "fetch", lambda: fetched.append(True))
    monkeypatch.setattr(bench, "_compare", lambda args: seen.append(args) or [])
    monkeypatch.setattr(bench, "print_results", lambda results: None)
    assert cli.main(["bench", verb]) == 0
    assert fetched == [True]
    [args] = seen
    assert args.model == str(smollm2.cache_folder())
    assert args.dataset_name == "chats"
    methods = {method.name for method in bench.plan_of(args).methods}
    assert {"plain", "ngram"} < methods


def test_an_installed_package_says_why_nothing_was_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise smollm2.FetchError("is this machine online?")

    monkeypatch.setattr(bench, "SHIPPED_MODELS", tmp_path)
    monkeypatch.setattr(smollm2, "fetch", fail)
    assert cli.main(["bench", "throughput"]) == 1
    assert "is this machine online?" in capsys.readouterr().err
