"""Workloads: which prompts, how long, sampled how."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from vllm_emssd.bench import chats, corpus
from vllm_emssd.bench.chats import Builder
from vllm_emssd.bench.request import SAMPLING_KEYS, Prompt, Request, Tokenizer

SHIPPED_MODELS = Path(__file__).parents[2] / "models"  # in a checkout

DESCRIPTIONS: dict[str, str] = {
    "completion": "held-out source files, cut anywhere (models/prompts.jsonl)",
    "prose": "Python's manual, cut anywhere",
    "half-random": "completion, greedy, and prose at temperature 1, in turns",
    "question": "open questions to a chat model; answers end where the model ends them",
    "summary": "passages of this project's documents and Python's manual, to sum up",
    "edit": "passages and functions, to be returned with a small change",
    "chats": "question, edit and summary in turns",
    "custom": "--dataset-path: a JSON object a line, with `prompt`, and if wanted "
    "`output_tokens`, `temperature`, ...",
}
FILE_KEYS = ("prompt", "output_tokens", "source", *SAMPLING_KEYS)


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """Defaults for what a prompt does not say itself. Lengths in tokens."""

    max_tokens: int = 96
    max_prompt_tokens: int = 512
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    path: Path | None = None  # of `custom`


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    requests: list[Request]

    def summary(self) -> dict[str, Any]:
        """What a result file states of it. Lengths in tokens."""
        return {
            "name": self.name,
            "num_requests": len(self.requests),
            "num_prompt_tokens": _range(
                [len(r.prompt_token_ids) for r in self.requests]
            ),
            "max_tokens": _range([r.max_tokens for r in self.requests]),
            "sampling": _distinct(r.sampling for r in self.requests),
        }


def _range(values: Sequence[int]) -> dict[str, float]:
    return {"least": min(values), "median": median(values), "most": max(values)}


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def load_workload(
    name: str, tokenizer: Tokenizer, options: WorkloadOptions, num_requests: int
) -> Workload:
    """The first `num_requests` of a workload, from its start again where it has fewer.

    Raises ValueError for one that is not known or cannot be loaded.
    """
    if name == "custom":
        prompts = read_prompts(options.path)
    elif name in BUILDERS:
        prompts = BUILDERS[name](tokenizer, options.max_prompt_tokens)
    else:
        raise ValueError(
            f"unknown dataset {name!r}; choose from {', '.join(DESCRIPTIONS)}"
        )
    if not prompts:
        raise ValueError(f"dataset {name!r} has no prompts on this machine")
    repeated = list(prompts) * (num_requests // len(prompts) + 1)
    return Workload(name, requests_of(repeated[:num_requests], tokenizer, options))


def requests_of(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, options: WorkloadOptions
) -> list[Request]:
    """Long prompts lose their start: what is continued is at the end."""
    return [
        Request(
            tokenizer.encode(prompt.text)[-options.max_prompt_tokens :],
            options.max_tokens if prompt.max_tokens is None else prompt.max_tokens,
            options.sampling | prompt.sampling,
            prompt.source,
            prompt.stops_at_eos,
        )
        for prompt in prompts
    ]


def read_prompts(path: Path | None) -> list[Prompt]:
    """Of a JSONL file. Raises ValueError with the number of a line that is wrong."""
    if path is None or not path.is_file():
        raise ValueError(f"--dataset-path: there is no file {path or ''}")
    prompts = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            if unknown := line.keys() - {*FILE_KEYS}:
                raise ValueError(f"unknown keys {sorted(unknown)}; known: {FILE_KEYS}")
            prompts.append(
                Prompt(
                    line["prompt"],
                    max_tokens=line.get("output_tokens"),
                    sampling={key: line[key] for key in SAMPLING_KEYS if key in line},
                    source=line.get("source", ""),
                )
            )
        except KeyError:
            raise ValueError(f"{path}:{number}: no 'prompt'") from None
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return prompts


def _completion(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    path = SHIPPED_MODELS / "prompts.jsonl"
    if not path.exists():
        raise ValueError(
            "dataset 'completion' is in the repository only, and this is an installed "
            "package; choose another, e.g. prose"
        )
    return read_prompts(path)


def _prose(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    """Cut in the middle, so that much of a topic is left to say."""
    return [
        Prompt(one.text[: len(one.text) // 2], source=one.source)
        for one in corpus.prose()
    ]


def _in_turns(*kinds: Builder) -> Builder:
    def build(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
        built = (kind(tokenizer, max_prompt_tokens) for kind in kinds)
        return list(chain.from_iterable(zip(*built, strict=False)))

    return build


def _at_temperature(temperature: float, kind: Builder) -> Builder:
    def build(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
        return [
            replace(prompt, sampling={"temperature": temperature})
            for prompt in kind(tokenizer, max_prompt_tokens)
        ]

    return build


CHATS: dict[str, Builder] = {
    "question": chats.in_chat_format(chats.questions),
    "edit": chats.in_chat_format(chats.edits),
    "summary": chats.in_chat_format(chats.summaries),
}
BUILDERS: dict[str, Builder] = {
    **CHATS,
    "chats": _in_turns(*CHATS.values()),
    "completion": _completion,
    "prose": _prose,
    "half-random": _in_turns(
        _at_temperature(0.0, _completion), _at_temperature(1.0, _prose)
    ),
}
