"""Prompts from a JSONL file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_emssd.bench.request import SAMPLING_KEYS, Prompt

QUESTION_KEYS = {"question_id", "category", "reference"}  # of MT-Bench, Spec-Bench


def read_jsonl(path: Path) -> list[Prompt]:
    """One object a line: `prompt` (or `turns`, whose first counts), and if wanted
    `max_tokens`, `arrival_ms` and sampling parameters.

    Raises ValueError with the line's number.
    """
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            prompts.append(prompt_of(json.loads(line)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not prompts:
        raise ValueError(f"{path} is empty")
    return prompts


def prompt_of(line: dict[str, Any]) -> Prompt:
    """Raises ValueError for keys that are not known, or no prompt."""
    if not isinstance(line, dict):
        raise ValueError("not an object")
    own = {"prompt", "turns", "max_tokens", "arrival_ms", "source", *SAMPLING_KEYS}
    if unknown := line.keys() - own - QUESTION_KEYS:
        raise ValueError(f"unknown keys {sorted(unknown)}; known: {sorted(own)}")
    if "prompt" not in line and "turns" not in line:
        raise ValueError("neither 'prompt' nor 'turns'")
    return Prompt(
        text=line["prompt"] if "prompt" in line else line["turns"][0],
        max_tokens=line.get("max_tokens"),
        sampling={key: line[key] for key in SAMPLING_KEYS if key in line},
        arrival_ms=line.get("arrival_ms"),
        source=line.get("source", ""),
    )
