"""What one check of `vllm-emssd doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    OK = "ok"
    SLOW = "slow"  # serves, but slower than it could
    WRONG = "wrong"  # does not serve with emssd


@dataclass(frozen=True, slots=True)
class Finding:
    about: str
    state: State
    found: str
    fix: str = ""  # what to change, where the state is not OK


def did_not_work(about: str, error: Exception) -> Finding:
    """A check that raised, in a row of its own."""
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return Finding(
        about, State.WRONG, what, "what it names is missing or broken: install it again"
    )
