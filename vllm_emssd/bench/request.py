"""One request of a workload: a prompt, and how to go on from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

# Of vLLM's SamplingParams: what a line of a file may set for itself.
SAMPLING_KEYS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text, with what the workload itself asks for; None or missing: the default."""

    text: str
    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    stops_at_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """Ready for an engine."""

    prompt_token_ids: list[int]
    max_tokens: int
    sampling: dict[str, Any]  # keys of SAMPLING_KEYS
    source: str = ""
    stops_at_eos: bool = False  # else it goes on to max_tokens

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(f"empty prompt ({self.source or 'no source given'})")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, must be at least 1")

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.prompt_token_ids) + self.max_tokens
