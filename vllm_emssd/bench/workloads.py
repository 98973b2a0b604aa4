"""Workloads: which prompts, how long, sampled how, arriving when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from vllm_emssd.bench import chats, copying, corpus
from vllm_emssd.bench.chats import Builder
from vllm_emssd.bench.prompt_files import read_jsonl
from vllm_emssd.bench.public_sets import (
    PUBLIC_SETS,
    public_prompts,
    sharegpt_prompts,
)
from vllm_emssd.bench.request import Prompt, Request, Tokenizer

SHIPPED_MODELS = Path(__file__).parents[2] / "models"  # in a checkout

DESCRIPTIONS: dict[str, str] = {
    "copy": "copy-heavy held-out text: renamed files, quotations, documentation",
    "copy-rename": "a source file, then the same with one name changed",
    "copy-quote": "a part of Python's manual, then quoted",
    "copy-document": "a function with its docstring, then its documentation",
    "completion": "held-out source files cut anywhere (models/prompts.jsonl)",
    "prose": "Python's manual, cut anywhere",
    "mixed": "copy, completion and prose in turns",
    "half-copy": "copy and completion in turns",
    "half-copy-random": "copy, greedy, and prose at temperature 0.7, in turns",
    "question": "open questions to a chat model; answers end where the model ends them",
    "summary": "passages of this project's documents and Python's manual, to sum up",
    "edit": "passages and functions, to be returned with a small change",
    "chats": "question, edit and summary in turns",
    "half-random": "completion, greedy, and prose at temperature 1, in turns",
    **{name: known.description for name, known in PUBLIC_SETS.items()},
    "hf:OWNER/NAME:SPLIT:COLUMN": "a data set of Hugging Face's",
    "sharegpt:FILE.json": "a ShareGPT file",
    "FILE.jsonl": "a line a request: prompt (or turns), max_tokens, temperature, ...",
}


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """Defaults for what a line does not say itself. Lengths in tokens."""

    max_tokens: int = 96
    max_prompt_tokens: int = 512
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    arrival_interval_ms: float = 0.0  # 0: all at once


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
            "last_arrival_ms": max(r.arrival_ms for r in self.requests),
            "sampling": _distinct(r.sampling for r in self.requests),
        }

    def as_dict(self) -> dict[str, Any]:
        """The same of each request, beside the rounds."""
        return {
            "name": self.name,
            "num_prompt_tokens": [len(r.prompt_token_ids) for r in self.requests],
            "max_tokens": [r.max_tokens for r in self.requests],
            "sampling": [r.sampling for r in self.requests],
            "arrival_ms": [r.arrival_ms for r in self.requests],
            "sources": [r.source for r in self.requests],
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
    prompts = _prompts(name, tokenizer, options.max_prompt_tokens, num_requests)
    if not prompts:
        raise ValueError(f"workload {name!r} has no prompts on this machine")
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
            (
                i * options.arrival_interval_ms
                if prompt.arrival_ms is None
                else prompt.arrival_ms
            ),
            prompt.source,
            prompt.stops_at_eos,
        )
        for i, prompt in enumerate(prompts)
    ]


def _prompts(
    name: str, tokenizer: Tokenizer, max_prompt_tokens: int, num_prompts: int
) -> Sequence[Prompt]:
    if name in BUILDERS:
        return BUILDERS[name](tokenizer, max_prompt_tokens)
    if name in PUBLIC_SETS or name.startswith("hf:"):
        return public_prompts(name, num_prompts)
    if name.startswith("sharegpt:"):
        return sharegpt_prompts(_existing(name.removeprefix("sharegpt:")))
    if name.endswith(".jsonl"):
        return read_jsonl(_existing(name))
    raise ValueError(
        f"unknown workload {name!r}; choose from {', '.join(DESCRIPTIONS)}"
    )


def _existing(name: str) -> Path:
    if not Path(name).exists():
        raise ValueError(f"workload: {name} does not exist")
    return Path(name)


def _completion(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    path = SHIPPED_MODELS / "prompts.jsonl"
    if not path.exists():
        raise ValueError(
            "workload 'completion' is in the repository only, and this is an installed "
            "package; choose another, e.g. prose"
        )
    return read_jsonl(path)


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
    "copy": copying.copying_prompts,
    "copy-rename": copying.renamed_files,
    "copy-quote": copying.quotations,
    "copy-document": copying.docstrings_to_documentation,
    "completion": _completion,
    "prose": _prose,
    "mixed": _in_turns(copying.copying_prompts, _completion, _prose),
    "half-copy": _in_turns(copying.copying_prompts, _completion),
    "half-copy-random": _in_turns(
        _at_temperature(0.0, copying.copying_prompts), _at_temperature(0.7, _prose)
    ),
    "half-random": _in_turns(
        _at_temperature(0.0, _completion), _at_temperature(1.0, _prose)
    ),
}
