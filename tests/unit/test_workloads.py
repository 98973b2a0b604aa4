"""Prompts: what is in them, and what a bad file is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vllm_emssd.bench import copying, corpus, public_sets
from vllm_emssd.bench.prompt_files import read_jsonl
from vllm_emssd.bench.public_sets import public_prompts, sharegpt_prompts
from vllm_emssd.bench.request import Prompt, Request
from vllm_emssd.bench.workloads import (
    BUILDERS,
    SHIPPED_MODELS,
    Workload,
    WorkloadOptions,
    load_workload,
    requests_of,
)

MAX_PROMPT_TOKENS = 400


class Words:
    """A tokenizer of words, spaces and line ends: the ids are of the words' order."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        words = text.replace("\n", " \n ").split(" ")
        return [self._known.setdefault(word, len(self._known)) for word in words]

    def decode(self, token_ids: list[int]) -> str:
        words = list(self._known)
        return " ".join(words[i] for i in token_ids)


OPTIONS = WorkloadOptions(max_tokens=32, max_prompt_tokens=MAX_PROMPT_TOKENS)


@pytest.mark.parametrize("name", BUILDERS)
def test_named_workloads(name: str) -> None:
    """The same every time, of different texts, within the limit."""
    first = load_workload(name, Words(), OPTIONS, 24)
    again = load_workload(name, Words(), OPTIONS, 24)
    assert first == again
    assert len(first.requests) == 24
    stated = first.as_dict()
    assert max(stated["num_prompt_tokens"]) <= MAX_PROMPT_TOKENS
    assert min(stated["num_prompt_tokens"]) > 8
    assert stated["max_tokens"] == [32] * 24
    assert len(set(stated["sources"])) > 12
    shortest = min(stated["num_prompt_tokens"])
    assert first.summary()["num_prompt_tokens"]["least"] == shortest
    assert first.summary()["num_requests"] == 24
    assert all(s in stated["sampling"] for s in first.summary()["sampling"])


def test_a_renamed_file_changes_one_name() -> None:
    prompts = copying.renamed_files(Words(), MAX_PROMPT_TOKENS)
    for prompt in prompts[:5]:
        header = prompt.text.index(" renamed to ")
        old = prompt.text[:header].rsplit(" ", 1)[1]
        original, second = prompt.text.split(f", {old} renamed to item\n")
        copy = second.split(f", {old} renamed to entry\n")[0]
        lines = original.splitlines()[1:-2]  # between the headers
        assert copy.splitlines()[: len(lines)] == [
            copying.rename(line, old, "item") for line in lines
        ]


def test_a_name_is_a_whole_word() -> None:
    assert copying.rename("x in xs: f(x)", "x", "y") == "y in xs: f(y)"
    assert copying.commonest_name("def run(self): return self.run(value)") == "run"


def test_copies_begin_and_do_not_end() -> None:
    """What is left to copy is in the prompt already."""
    for prompt in copying.quotations(Words(), MAX_PROMPT_TOKENS)[:5]:
        first, rest = prompt.text.split("The manual says:\n")
        second, begun = rest.split("To quote the manual:\n")
        assert second.startswith(begun.strip())
        assert first.split("\n", 1)[1].strip() == second.strip()
        assert len(begun) < 0.6 * len(second)


def test_too_short_to_copy() -> None:
    with pytest.raises(ValueError, match="--max-prompt-tokens"):
        copying.chunk_tokens(100)


def test_held_out_is_of_the_prompts_files() -> None:
    """The split of the shipped models' training: its prompts are held out."""
    prompts = read_jsonl(SHIPPED_MODELS / "prompts.jsonl")
    assert all(corpus.is_held_out(prompt.source) for prompt in prompts)
    held_out = [corpus.is_held_out(f"stdlib/{i}.py") for i in range(1200)]
    assert 70 < sum(held_out) < 130


# ---------------------------------------------------------------- requests


def test_lines_say_for_themselves() -> None:
    prompts = [
        Prompt("a b c"),
        Prompt("a b c d", max_tokens=3, sampling={"temperature": 0.8, "seed": 1}),
        Prompt("a b", arrival_ms=5.0),
    ]
    options = WorkloadOptions(
        max_tokens=9,
        max_prompt_tokens=3,
        sampling={"temperature": 0.2},
        arrival_interval_ms=100.0,
    )
    requests = requests_of(prompts, Words(), options)
    assert [r.max_tokens for r in requests] == [9, 3, 9]
    assert [r.sampling for r in requests] == [
        {"temperature": 0.2},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.2},
    ]
    assert [r.arrival_ms for r in requests] == [0.0, 100.0, 5.0]
    assert requests[1].prompt_token_ids == Words().encode("a b c d")[1:]


def test_impossible_requests() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        Request([], 1, {})
    with pytest.raises(ValueError, match="max_tokens"):
        Request([1], 0, {})


# ---------------------------------------------------------------- files


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path / "some.jsonl",
        {"prompt": "a", "temperature": 0.5, "max_tokens": 7},
        {"question_id": 1, "category": "qa", "turns": ["b", "c"]},
    )
    assert read_jsonl(path) == [
        Prompt("a", max_tokens=7, sampling={"temperature": 0.5}),
        Prompt("b"),
    ]
    loaded = load_workload(str(path), Words(), OPTIONS, 5)
    assert isinstance(loaded, Workload)
    assert [r.max_tokens for r in loaded.requests] == [7, 32, 7, 32, 7]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            {"prompt": "a", "temprature": 1},
            r"some.jsonl:1: unknown keys \['temprature'",
        ),
        ({"max_tokens": 1}, "neither 'prompt' nor 'turns'"),
        ([1], "some.jsonl:1"),
    ],
)
def test_bad_lines(tmp_path: Path, line: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_jsonl(write(tmp_path / "some.jsonl", line))


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty"):
        read_jsonl(write(tmp_path / "some.jsonl"))


def test_sharegpt(tmp_path: Path) -> None:
    path = tmp_path / "share.json"
    human = {"from": "human", "value": "hello"}
    answer = {"from": "gpt", "value": "hi"}
    talks = [[human, answer], [answer, human], []]
    path.write_text(json.dumps([{"conversations": talk} for talk in talks]))
    assert [p.text for p in sharegpt_prompts(path)] == ["hello"]
    path.write_text(json.dumps([{"messages": []}]))
    with pytest.raises(ValueError, match="not a ShareGPT file"):
        sharegpt_prompts(path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("novels", "choose from copy"),
        ("missing.jsonl", "missing.jsonl does not exist"),
        ("sharegpt:missing.json", "missing.json does not exist"),
        ("hf:owner/name", "hf:OWNER/NAME:SPLIT:COLUMN"),
    ],
)
def test_unknown_workloads(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_workload(name, Words(), OPTIONS, 1)


def test_public_sets_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        public_prompts("cnn-dailymail", 3)


def test_public_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the library, and which prompt is made of a row."""
    rows = {
        "abisee/cnn_dailymail": [{"article": "news"}] * 9,
        "philschmid/mt-bench": [{"turns": ["first", "second"]}] * 2,
        "owner/name": [{"text": "words"}],
    }

    class Library:
        @staticmethod
        def load_dataset(path: str, **others: str) -> list[dict[str, object]]:
            assert others["split"] in ("test", "train", "dev")
            return rows[path]

    monkeypatch.setitem(sys.modules, "datasets", Library)
    assert public_prompts("cnn-dailymail", 3)[2].text == (
        public_sets.SUMMARISE.format("news")
    )
    assert [p.text for p in public_prompts("mt-bench", 3)] == ["first"] * 2
    assert [p.text for p in public_prompts("hf:owner/name:dev:text", 3)] == ["words"]
    with pytest.raises(ValueError, match="cannot be loaded"):
        public_prompts("hf:owner/other:dev:text", 3)
