"""Prompts: what is in them, and what a bad file is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_emssd.bench import chats, corpus
from vllm_emssd.bench.request import Prompt, Request
from vllm_emssd.bench.workloads import (
    BUILDERS,
    SHIPPED_MODELS,
    WorkloadOptions,
    load_workload,
    read_prompts,
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
    assert len({request.source for request in first.requests}) > 12
    stated = first.summary()
    assert stated["num_requests"] == 24
    assert stated["num_prompt_tokens"]["most"] <= MAX_PROMPT_TOKENS
    assert stated["num_prompt_tokens"]["least"] > 8
    assert stated["max_tokens"] == {"least": 32, "median": 32, "most": 32}
    assert all(request.sampling in stated["sampling"] for request in first.requests)


def test_an_edit_asks_for_the_code_with_one_name_changed() -> None:
    edits = chats.edits(Words(), MAX_PROMPT_TOKENS)
    assert any("Rename `" in edit.text for edit in edits)
    assert chats.commonest_name("def run(self): return self.run(value)") == "run"


def test_held_out_is_of_the_prompts_files() -> None:
    """The split of the shipped models' training: its prompts are held out."""
    prompts = read_prompts(SHIPPED_MODELS / "prompts.jsonl")
    assert all(corpus.is_held_out(prompt.source) for prompt in prompts)
    held_out = [corpus.is_held_out(f"stdlib/{i}.py") for i in range(1200)]
    assert 70 < sum(held_out) < 130


# ---------------------------------------------------------------- requests


def test_lines_say_for_themselves() -> None:
    prompts = [
        Prompt("a b c"),
        Prompt("a b c d", max_tokens=3, sampling={"temperature": 0.8, "seed": 1}),
        Prompt("a b"),
    ]
    options = WorkloadOptions(
        max_tokens=9,
        max_prompt_tokens=3,
        sampling={"temperature": 0.2},
    )
    requests = requests_of(prompts, Words(), options)
    assert [r.max_tokens for r in requests] == [9, 3, 9]
    assert [r.sampling for r in requests] == [
        {"temperature": 0.2},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.2},
    ]
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


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "some.jsonl",
        {"prompt": "a", "temperature": 0.5, "output_tokens": 7},
        {"prompt": "b"},
    )
    assert read_prompts(path) == [
        Prompt("a", max_tokens=7, sampling={"temperature": 0.5}),
        Prompt("b"),
    ]
    loaded = load_workload("custom", Words(), replace(OPTIONS, path=path), 5)
    assert [r.max_tokens for r in loaded.requests] == [7, 32, 7, 32, 7]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            {"prompt": "a", "temprature": 1},
            r"some.jsonl:1: unknown keys \['temprature'",
        ),
        ({"output_tokens": 1}, "some.jsonl:1: no 'prompt'"),
        ([1], "some.jsonl:1"),
    ],
)
def test_bad_lines(tmp_path: Path, line: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_prompts(write(tmp_path / "some.jsonl", line))


@pytest.mark.parametrize(
    ("name", "path", "says"),
    [
        ("novels", None, "choose from completion"),
        ("custom", None, "--dataset-path"),
        ("custom", Path("missing.jsonl"), "no file missing.jsonl"),
        ("custom", Path("/dev/null"), "no file"),
    ],
)
def test_unknown_workloads(name: str, path: Path | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_workload(name, Words(), replace(OPTIONS, path=path), 1)


def test_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl")
    with pytest.raises(ValueError, match="has no prompts"):
        load_workload("custom", Words(), replace(OPTIONS, path=path), 1)
