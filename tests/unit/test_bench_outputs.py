"""Figures, HTTP commands and the proposer's timing, from made-up measurements."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.unit.test_workloads import Words
from vllm_emssd import cli
from vllm_emssd.bench import proposer_time
from vllm_emssd.bench.comparison import compare_all
from vllm_emssd.bench.engine_process import EngineOptions
from vllm_emssd.bench.harness import Measurement
from vllm_emssd.bench.methods import Method, MethodOptions
from vllm_emssd.bench.over_http import KEPT, load_command, summaries, write_prompts
from vllm_emssd.bench.plots import (
    FIGURES,
    draw_acceptance,
    draw_rows,
    draw_speed_up,
    label_of,
)
from vllm_emssd.bench.provenance import provenance
from vllm_emssd.bench.report import (
    print_http_results,
    print_proposer_times,
    print_results,
    write_result,
)
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import RequestStep, Round
from vllm_emssd.bench.server import Server, serve_command
from vllm_emssd.commands import bench

OPTIONS = EngineOptions("TARGET", "TOKENIZER", max_model_len=640, max_num_seqs=8)


def result(in_one_engine: bool = False) -> dict[str, object]:
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

    measured = Measurement(
        rounds={
            1: {"plain": rounds(0.5, 1), "llma": rounds(0.5, 2)},
            8: {"plain": rounds(0.5, 1), "llma": rounds(0.25, 4)},
        }
    )
    return {
        "provenance": provenance(),
        "workload": {"name": "copy"},
        "results": compare_all(measured, [9], k=5, in_one_engine=in_one_engine),
    }


def test_plot_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table2.json"
    write_result(path, result())
    assert cli.main(["plot", str(path), "-o", str(tmp_path / "figures")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / f"figures/table2-{name}.png") for name in FIGURES]
    assert all(Path(line).stat().st_size > 5000 for line in printed)


def test_plot_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert cli.main(["plot", str(path), "-o", str(tmp_path)]) == 1
    assert "is no result of vllm-emssd bench" in capsys.readouterr().err
    assert cli.main(["plot", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_what_is_drawn() -> None:
    axes = Figure().subplots()
    draw_speed_up(axes, result())
    (line,) = axes.containers
    assert line.lines[0].get_ydata().tolist() == [1.0, 2.0]
    axes = Figure().subplots()
    draw_acceptance(axes, result())
    (bars,) = axes.containers
    assert [(b.get_height(), round(b.get_x() + 0.4)) for b in bars] == [(1.0, 3)]
    axes = Figure().subplots()
    draw_rows(axes, result())
    target, _ = axes.containers
    assert [bar.get_height() for bar in target] == [10 / 2, 13 / 5]


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
    assert sum('"tokens_per_s"' in line for line in lines) == len(made["results"]) * 2
    read = json.loads(path.read_text())
    assert read.pop("nothing") is None
    assert read.pop("third") == 0.33333
    assert read["provenance"]["commit"] == made["provenance"]["commit"]
    first, second = read["results"]
    assert first["methods"]["llma"]["accepted_histogram"] == {"1": 3}
    assert second["methods"]["llma"]["num_rounds"] == 3
    assert second["ratios"]["llma/plain"] == {"ratio": 2.0, "low": 2.0, "high": 2.0}


def test_bench_writes_rounds_only_if_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"results": [], "raw": {"rounds": {"1": "all of them"}}}
    monkeypatch.setattr(bench, "_compare", lambda args: dict(found))
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    assert cli.main(["bench", "--output", str(small)]) == 0
    assert "rounds" not in json.loads(small.read_text())
    assert list(tmp_path.iterdir()) == [small]
    command = ["bench", "--save-rounds", str(large), "--temperature", "0.5"]
    assert cli.main(command) == 0
    written = json.loads(large.read_text())
    assert written["rounds"] == found["raw"]["rounds"]
    assert written["provenance"]["machine"]
    assert written["arguments"]["temperature"] == 0.5
    assert "draft_model" not in written["arguments"]


def test_printing_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(result()["results"])  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "llma/plain" in printed
    assert "preempted" not in printed
    assert "as slow in all rounds" not in printed
    print_results(result(in_one_engine=True)["results"])  # type: ignore[arg-type]
    assert "as slow in all rounds" in capsys.readouterr().out


def test_provenance_names_what_ran() -> None:
    made = provenance()
    assert made["vllm"].startswith("0.")
    assert made["commit"]
    assert made["command"]
    assert "/" not in (made["environment"]["LD_PRELOAD"] or "")
    assert "cores" in made["machine"]


# ---------------------------------------------------------------- over HTTP


def test_server_of_a_method() -> None:
    config = {"method": "emssd"}
    command = serve_command(Method("llma", config), OPTIONS, port=1234)
    assert json.loads(command[command.index("--speculative-config") + 1]) == config
    assert command[command.index("--max-model-len") + 1] == "640"
    plain = serve_command(Method("plain", None), OPTIONS, port=1234)
    assert "--speculative-config" not in plain
    assert list(plain) == list(command[: len(plain)])


def test_load_is_greedy_and_of_the_workload(tmp_path: Path) -> None:
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
    server = Server(Method("plain", None), "http://127.0.0.1:1", tmp_path / "log")
    command = load_command(
        server, OPTIONS, requests, prompts, 2, tmp_path / "result.json"
    )
    assert "--temperature=0.0" in command
    assert command[command.index("--max-concurrency") + 1] == "2"
    assert command[command.index("--num-prompts") + 1] == "2"


def test_load_of_mixed_sampling_is_refused(tmp_path: Path) -> None:
    requests = [Request([1], 1, {"temperature": t}) for t in (0.0, 1.0)]
    server = Server(Method("plain", None), "http://127.0.0.1:1", tmp_path / "log")
    with pytest.raises(ValueError, match="leave --http away"):
        load_command(server, OPTIONS, requests, tmp_path, 1, tmp_path / "r.json")


def test_http_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = {4: {"plain": [dict.fromkeys(KEPT, value) for value in (1.0, 9.0, 2.0)]}}
    found = summaries(rounds)
    plain = dict.fromkeys(KEPT, 2.0) | {"num_rounds": 3}
    assert found == [{"concurrency": 4, "methods": {"plain": plain}, "ratios": {}}]
    print_http_results(found)
    assert "TTFT" in capsys.readouterr().out


# ---------------------------------------------------------------- the proposer


def test_proposer_is_timed_at_its_contexts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every context is reached, a few tokens a step, by every request."""
    seen: list[tuple[int, int]] = []

    def recorder(num_reqs: int, options: MethodOptions) -> proposer_time.Propose:
        def propose(token_ids: np.ndarray, num_tokens: np.ndarray) -> None:
            known = int(num_tokens[0])
            assert (num_tokens == known).all()
            assert token_ids[:, :known].any(axis=1).all()
            seen.append((num_reqs, known))

        return propose

    monkeypatch.setattr(proposer_time, "CONTEXTS", (64, 256))
    monkeypatch.setattr(proposer_time, "_ngram", recorder)
    times = proposer_time.proposer_times(Words(), 2, 4, MethodOptions(None))
    assert [(t["proposer"], t["num_context_tokens"]) for t in times] == [
        ("llma", 64),
        ("llma", 256),
        ("ngram", 64),
        ("ngram", 256),
    ]
    assert seen[0] == (2, 64 - 4 * 8)
    assert seen[8] == (2, 64)
    assert seen[-1] == (2, 256)
    print_proposer_times(times)
    assert "llma" in capsys.readouterr().out


def test_sigterm_ends_a_bench_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what it started, in `with` blocks, ends too."""
    before = signal.getsignal(signal.SIGTERM)
    ended = []

    def compare(args: object) -> dict[str, object]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            ended.append(True)
        return {}

    monkeypatch.setattr(bench, "_compare", compare)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["bench", "--model", "TARGET"])
    assert ended == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_default_models_of_an_installed_package(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "SHIPPED_MODELS", tmp_path)
    assert cli.main(["bench", "--quick"]) == 1
    said = capsys.readouterr().err
    assert "--model and --draft-model" in said
