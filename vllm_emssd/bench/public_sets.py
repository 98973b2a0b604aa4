"""Public data sets by name, for who is online, and ShareGPT files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_emssd.bench.request import Prompt

SPEC_BENCH = (
    "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/"
    "question.jsonl"
)
SUMMARISE = "Summarize the following article.\n\n{}\n\nSummary:"


@dataclass(frozen=True, slots=True)
class PublicSet:
    """Arguments of `datasets.load_dataset`, and the prompt in a row."""

    arguments: Mapping[str, Any]
    prompt: Callable[[Mapping[str, Any]], str]
    description: str


PUBLIC_SETS: dict[str, PublicSet] = {
    "cnn-dailymail": PublicSet(
        {"path": "abisee/cnn_dailymail", "name": "3.0.0", "split": "test"},
        lambda row: SUMMARISE.format(row["article"]),
        "CNN/Daily Mail articles to summarise, as in the paper's table 2",
    ),
    "mt-bench": PublicSet(
        {"path": "philschmid/mt-bench", "split": "train"},
        lambda row: row["turns"][0],
        "MT-Bench, first turns",
    ),
    "spec-bench": PublicSet(
        {"path": "json", "data_files": SPEC_BENCH, "split": "train"},
        lambda row: row["turns"][0],
        "Spec-Bench, first turns",
    ),
}


def public_prompts(name: str, num_prompts: int) -> list[Prompt]:
    """The first rows of a set in PUBLIC_SETS, or of `hf:OWNER/NAME:SPLIT:COLUMN`.

    Raises ValueError where `datasets` is not installed or the set cannot be had.
    """
    chosen = PUBLIC_SETS.get(name) or _by_column(name)
    rows = _rows(name, chosen.arguments, num_prompts)
    return [
        Prompt(chosen.prompt(row), source=f"{name} {i}") for i, row in enumerate(rows)
    ]


def _by_column(name: str) -> PublicSet:
    try:
        path, split, column = name.removeprefix("hf:").split(":")
    except ValueError:
        raise ValueError(f"{name!r}: write hf:OWNER/NAME:SPLIT:COLUMN") from None
    return PublicSet({"path": path, "split": split}, lambda row: row[column], "")


def _rows(
    name: str, arguments: Mapping[str, Any], num_rows: int
) -> Iterable[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"workload {name!r} needs the package datasets: pip install datasets"
        ) from None
    try:
        rows = load_dataset(**arguments)
        return [rows[i] for i in range(min(num_rows, len(rows)))]
    except Exception as error:  # network, names, formats: whatever it says is the help
        raise ValueError(f"workload {name!r} cannot be loaded: {error}") from error


def sharegpt_prompts(path: Path) -> list[Prompt]:
    """First messages of a person in a ShareGPT file, a JSON list of conversations.

    Raises ValueError where the file is not one.
    """
    conversations = json.loads(path.read_text())
    try:
        opened = [c["conversations"][0] for c in conversations if c["conversations"]]
        prompts = [
            Prompt(turn["value"], source=f"{path.name} {i}")
            for i, turn in enumerate(opened)
            if turn["from"] == "human" and turn["value"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a ShareGPT file: {error!r}") from None
    if not prompts:
        raise ValueError(f"{path} has no conversation that a human opens")
    return prompts
