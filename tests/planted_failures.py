"""Functions that raise now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


class FailsAtTimes:
    """Wraps a function: every `every`-th call raises, half of them after the work."""

    def __init__(self, function: Callable[..., Any], every: int) -> None:
        self._function, self._every = function, every
        self.num_calls = self.num_failures = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        fails = self.num_calls % self._every == 0
        if fails and self.num_failures % 2:
            self.num_failures += 1
            raise ZeroDivisionError("planned, before")
        result = self._function(*args, **kwargs)
        if fails:
            self.num_failures += 1
            raise ZeroDivisionError("planned, after")
        return result


def break_parts(
    monkeypatch: pytest.MonkeyPatch, *parts: tuple[object, str, int]
) -> list[FailsAtTimes]:
    """`parts`: owner and name of each function, and which of its calls raise."""
    broken = []
    for owner, name, every in parts:
        broken.append(FailsAtTimes(getattr(owner, name), every))
        monkeypatch.setattr(owner, name, broken[-1])
    return broken
