"""What the demo says of its rounds: speeds, losses, and outputs that differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from scripts import demo
from vllm_emssd.bench.comparison import compare_all
from vllm_emssd.bench.harness import Rounds
from vllm_emssd.bench.methods import Method
from vllm_emssd.bench.round import RequestStep, Round
from vllm_emssd.bench.workloads import DESCRIPTIONS

METHODS = [Method("plain", None), Method("emssd auto", {})]


class Words:
    def decode(self, tokens: list[int]) -> str:
        return f"word{tokens[0]}"


def made_round(seconds: float, outputs: list[list[int]], sampled: int) -> Round:
    """Each of two requests: a first token, then one step of `sampled` tokens."""
    steps = [
        [RequestStep(0, 4, 0, 1), RequestStep(1, 4, 0, 1)],
        [RequestStep(0, 2, 1, sampled), RequestStep(1, 2, 1, 1)],
    ]
    return Round(
        seconds=seconds,
        num_tokens=sum(map(len, outputs)),
        outputs=[*outputs],
        steps=steps,
        target_forwards=[(8, 1.0), (4, 1.0)],
        draft_forwards=[(2, 1.0)],
    )


@pytest.fixture
def measured() -> Rounds:
    """At two at once `emssd auto` is twice as fast as plain, at one half as fast, and
    there its second output goes another way."""
    right, wrong = [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]
    return {
        1: {
            "plain": [made_round(1.0, right, 1) for _ in range(2)],
            "emssd auto": [made_round(2.0, right, 2), made_round(2.0, wrong, 2)],
        },
        2: {
            "plain": [made_round(1.0, right, 1) for _ in range(2)],
            "emssd auto": [made_round(0.5, right, 2) for _ in range(2)],
        },
    }


def test_table_tells_speeds_acceptance_rows_and_sameness(
    measured: Rounds,
) -> None:
    results = compare_all(measured)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(demo.make_table(measured, results, ["question", "edit"]))
    plain, ours = (
        " ".join(line.split()) for line in capture.get().splitlines() if "of 2" in line
    )
    assert plain == "plain 6 (1.00) 6 (1.00) 1.00 1.00 2.00+0.33 2 of 2"
    assert ours == "emssd auto 3 (0.50) 12 (2.00) 2.00 1.00 2.00+0.33 1 of 2"


def test_loss_is_told(measured: Rounds) -> None:
    results = compare_all(measured)
    assert list(demo.losses(results)) == [
        "emssd auto is slower than plain at 1 at once, by 50.0%."
    ]


def test_another_output_is_told(measured: Rounds) -> None:
    assert list(demo.describe_differences(measured, METHODS, Words(), 2)) == [
        "emssd auto: 1 outputs are not plain's; in that of prompt 2, token 2 is "
        "'word9' where plain has 'word5'."
    ]


def test_an_output_that_ends_early_differs(measured: Rounds) -> None:
    measured[1]["emssd auto"][0].outputs[0] = [1]
    assert list(demo.describe_differences(measured, METHODS, Words(), 2)) == [
        "emssd auto: 2 outputs are not plain's; in that of prompt 1, token 2 is "
        "None where plain has 'word2'."
    ]


def test_an_output_cut_by_the_end_of_its_round_is_compared_as_far_as_it_goes(
    measured: Rounds,
) -> None:
    cut = measured[2]["emssd auto"][0]
    cut.outputs, cut.unfinished = [[1, 2, 3], [4, 5, 6], [1, 2], [4, 9]], {2, 3}
    found = demo.different_prompts({2: measured[2]}, "emssd auto", 2)
    assert found == {1: [[4, 5, 6], [4, 9]]}


def test_table_is_written_beside_the_figure(
    measured: Rounds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figure = tmp_path / "shown.png"
    titles: list[str] = []
    monkeypatch.setattr("sys.argv", ["demo", "--shipped", "--figure", str(figure)])
    monkeypatch.setattr(demo, "list_methods", lambda *args: METHODS)
    monkeypatch.setattr(demo, "measure", lambda *args: measured)
    monkeypatch.setattr(demo, "draw", lambda _, title, *args: titles.append(title))
    assert demo.run(demo.parse_options()) == 1, "an output differs"
    # The shipped pair is not asked chats.
    assert titles == [f"completion: {DESCRIPTIONS['completion']}"]
    table = json.loads(figure.with_suffix(".json").read_text())
    assert table["provenance"]["command"].startswith("scripts/demo --shipped")
    assert {"commit", "machine", "vllm"} <= table["provenance"].keys()
    assert table["workload"]["name"] == "completion"
    [_, two] = table["results"]
    assert two["ratios"]["emssd auto/plain"] == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    # Of the 24 prompts two were asked.
    same = {name: found["same_as_plain"] for name, found in table["outputs"].items()}
    assert same == {"plain": 2, "emssd auto": 1}


@pytest.mark.parametrize(
    ("draft_model", "is_quick", "stock"),
    [
        ("smollm2-eagle3", False, ["eagle3 K=1", "eagle3 K=5"]),
        ("smollm2-eagle3", True, ["eagle3 K=1"]),
        ("draft", True, ["draft_model K=5"]),
    ],
)
def test_stock_drafts_with_the_same_model_at_several_lengths(
    draft_model: str, is_quick: bool, stock: list[str]
) -> None:
    methods = demo.list_methods(str(demo.MODELS / draft_model), is_quick)
    names = ["plain", "stock ngram", *(f"stock {name}" for name in stock)]
    assert [m.name for m in methods] == [*names, "emssd auto"]
    for method in methods[2 : len(names)]:
        config = method.speculative_config or {}
        lengths = f"{config['method']} K={config['num_speculative_tokens']}"
        assert method.name == f"stock {lengths}"
        assert config["model"] == str(demo.MODELS / draft_model)


def test_without_a_network_the_shipped_pair_is_shown(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: object) -> None:
        raise demo.FetchError("is this machine online?")

    monkeypatch.setattr(demo, "fetch", fail)
    monkeypatch.setattr("sys.argv", ["demo"])
    model, draft_model = demo.choose_pair(demo.parse_options())
    assert model == str(demo.MODELS / "target")
    assert draft_model == str(demo.MODELS / "draft")
    assert "is this machine online?" in capsys.readouterr().out
