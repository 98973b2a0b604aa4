"""A pytest plugin: emssd drafts wherever a test asks for `draft_model` or `ngram`.

Loaded by `scripts/vllm_tests` into vLLM's own tests (`-p scripts.compat.stand_in`).
Options that only stock's n-gram search has are taken away, and lengths are fixed, as
stock's are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import pytest

OF_NGRAM = ("prompt_lookup_max", "prompt_lookup_min")
stood_in: list[str] = []  # the stock method of each engine that got emssd


def replaced(asked: dict[str, Any]) -> dict[str, Any]:
    """The same speculation by emssd; other methods as they are."""
    if asked.get("method") not in ("draft_model", "ngram"):
        return asked
    stood_in.append(asked["method"])
    kept = {name: value for name, value in asked.items() if name not in OF_NGRAM}
    return kept | {"method": "emssd", "draft_length": "fixed"}


def pytest_configure() -> None:
    import tests.utils
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    create = EngineArgs.create_speculative_config

    @wraps(create)
    def create_speculative_config(self: EngineArgs, **options: Any) -> Any:
        if self.speculative_config:
            self.speculative_config = replaced(self.speculative_config)
        return create(self, **options)

    EngineArgs.create_speculative_config = create_speculative_config
    # Raises on a CPU, where files that call it could not be imported.
    tests.utils.get_attn_backend_list_based_on_platform = lambda: []
    # Skips tests whose models are large; the shipped pair runs in their place.
    tests.utils.large_gpu_mark = lambda min_gb: pytest.mark.skipif(False, reason="")
    # Raises on a CPU; tests call it between two engines.
    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test that never came to emssd shows nothing about it."""
    before = len(stood_in)
    result = yield
    if len(stood_in) == before:
        pytest.fail("passed without asking for draft_model or ngram")
    return result
