"""Replacing names: all or none, for a block, and what is told of those that do not fit.

Each hook of the plugin is installed and undone in test_inventory.py.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from vllm_emssd.integration.hooks.compat import SUPPORTED_VLLM, check_vllm_version
from vllm_emssd.integration.hooks.hook import (
    Hook,
    difference,
    install,
    installed,
    is_installed,
)

MODULE = "stub_of_vllm"


def add(x: int, y: int = 0) -> int:
    return x + y


class Runner:
    def __init__(self, config: str, device: str) -> None:
        self.config, self.device = config, device

    def run(self, steps: int) -> int:
        return steps


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with a function, a class and a method of it; unhooked afterwards."""
    module = types.ModuleType(MODULE)
    module.add = add
    module.Runner = type("Runner", (), dict(vars(Runner)))
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr("vllm_emssd.integration.hooks.hook._originals", {})
    return module


def hook_of(
    path: str = "add",
    signature: str = "x, y",
    make: Callable[[Any], Any] = lambda stock: lambda x, y=0: stock(x, y) + 100,
) -> Hook:
    return Hook(f"{MODULE}:{path}", "why", signature, "remove when", make)


RUN_HOOK = hook_of(
    "Runner.run", "self, steps", lambda stock: lambda self, steps: -stock(self, steps)
)
DRIFTED_HOOK = hook_of("add", "x, y, z")
MISSING_HOOK = hook_of("subtract", "x, y")


@pytest.mark.parametrize("bad", [DRIFTED_HOOK, MISSING_HOOK])
@pytest.mark.parametrize("is_last", [True, False])
def test_one_that_does_not_fit_installs_none(
    stub: types.ModuleType, bad: Hook, is_last: bool
) -> None:
    run = stub.Runner.run
    asked = [RUN_HOOK, bad] if is_last else [bad, RUN_HOOK]
    with pytest.raises(RuntimeError, match=MODULE):
        install(asked)
    assert stub.add is add
    assert stub.Runner.run is run
    assert not any(map(is_installed, asked))


@pytest.mark.parametrize(
    ("hook", "found"),
    [
        (DRIFTED_HOOK, "takes (x, y), expected (x, y, z)"),
        (MISSING_HOOK, "is missing"),
        (hook_of("Walker.run"), "is missing"),
        (Hook("no_such_module:f", "", "", "", id), "is missing"),
    ],
)
def test_drift_names_target_and_supported_versions(
    stub: types.ModuleType, hook: Hook, found: str
) -> None:
    differs = difference(hook)
    assert found in differs
    assert hook.target in differs
    assert str(SUPPORTED_VLLM) in differs


def test_check_looks_at_the_original(stub: types.ModuleType) -> None:
    """The replacement may take other parameters; that is no drift."""
    hook = hook_of(make=lambda stock: lambda *args: 0)
    install([hook])
    assert difference(hook) == ""
    assert stub.add(1, 2) == 0


def test_installed_ends_with_an_error_in_the_block(stub: types.ModuleType) -> None:
    with pytest.raises(ZeroDivisionError), installed([hook_of()]):
        raise ZeroDivisionError
    assert stub.add is add


def test_installed_leaves_hooks_that_were_there(stub: types.ModuleType) -> None:
    run = stub.Runner.run
    install([hook_of()])
    with installed([hook_of(), RUN_HOOK]):
        assert stub.add(1) == 101
        assert stub.Runner.run is not run
    assert stub.add(1) == 101
    assert stub.Runner.run is run


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.32.0+cpu", "0.33.0rc1"])
def test_supported_versions_pass(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0.dev3", "1.0"])
def test_other_versions_are_refused_by_name(version: str) -> None:
    with pytest.raises(RuntimeError, match=f"found {version}") as caught:
        check_vllm_version(version)
    assert str(SUPPORTED_VLLM) in str(caught.value)
