"""A pytest plugin: emssd drafts wherever a test asks for `draft_model` or `ngram`.

Loaded by `scripts/vllm_tests` into vLLM's own tests (`-p scripts.in_place_of_stock`).
The options that only stock's n-gram search has are taken away; lengths are fixed, as
stock's are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import wraps
from typing import Any

import pytest

NGRAM_OPTIONS = ("prompt_lookup_max", "prompt_lookup_min")
_num_replaced: Counter[str] = Counter()  # by the stock method


def replaced(asked: dict[str, Any]) -> dict[str, Any]:
    """The same speculation by emssd; other methods as they are."""
    method = asked.get("method")
    if method is None and asked.get("model") in ("ngram", "[ngram]"):
        method = "ngram"
    if method not in ("draft_model", "ngram"):
        return asked
    options = asked | {"method": "emssd", "draft_length": "fixed"}
    if method == "ngram":
        for name in ("model", *NGRAM_OPTIONS):
            options.pop(name, None)
        options.setdefault("num_speculative_tokens", 3)
    _num_replaced[method] += 1
    return options


def pytest_configure(config: pytest.Config) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    create = EngineArgs.create_speculative_config

    @wraps(create)
    def create_speculative_config(self: EngineArgs, *args: Any) -> Any:
        if self.speculative_config:
            self.speculative_config = replaced(self.speculative_config)
        return create(self, *args)

    EngineArgs.create_speculative_config = create_speculative_config


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out cases of other methods; what asks for a large GPU runs the shipped
    models, for which any machine will do."""
    others = [item for item in items if "eagle" in item.name]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    for item in items:
        for node in item.listchain():
            node.own_markers[:] = [m for m in node.own_markers if not _wants_memory(m)]


def _wants_memory(mark: pytest.Mark) -> bool:
    return mark.name == "skipif" and "GPU memory" in str(mark.kwargs.get("reason"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that never came to emssd shows nothing about it."""
    before = _num_replaced.total()
    result = yield
    if _num_replaced.total() == before:
        pytest.fail("passed without asking for draft_model or ngram")
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = ", ".join(f"{method}: {n}" for method, n in _num_replaced.items())
    terminalreporter.write_line(f"emssd in the place of stock's methods: {counts}")
