"""Our own hooks against the installed vLLM: all listed, all fitting, all reversible."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import EngineArgs

import vllm_emssd
from tests.engine import TARGET
from tests.without_hooks import without
from vllm_emssd.integration import hook_inventory
from vllm_emssd.integration.frontend.method import FRONTEND_HOOK
from vllm_emssd.integration.frontend.serving import (
    SERVING_HOOKS,
    VALIDATION_HOOK,
    tag_of,
)
from vllm_emssd.integration.hook_inventory import INVENTORY, describe
from vllm_emssd.integration.hooks.compat import SUPPORTED_VLLM
from vllm_emssd.integration.hooks.hook import (
    Hook,
    difference,
    install,
    is_installed,
    undo,
)

NGRAM = {"num_speculative_tokens": 2, "prompt_lookup_max": 2}
PATCHES = Path(__file__).parent.parent.parent / "patches"
HOOK = re.compile(r"\bHook\($", re.MULTILINE)
each_hook = pytest.mark.parametrize("hook", INVENTORY, ids=lambda hook: hook.target)


@pytest.fixture
def without_hooks() -> Iterator[None]:
    """As in a process that has not loaded the plugin."""
    with without(INVENTORY):
        yield


def test_every_hook_in_the_source_is_listed() -> None:
    sources = Path(hook_inventory.__file__).parent.rglob("*.py")
    written = [t for path in sources for t in HOOK.findall(path.read_text())]
    assert len(INVENTORY) == len(written)
    assert len(INVENTORY) == len({hook.target for hook in INVENTORY})


@each_hook
def test_target_exists_with_the_signature_written_down(hook: Hook) -> None:
    assert difference(hook) == ""


@each_hook
def test_texts_and_patches_are_there(hook: Hook) -> None:
    assert all((hook.why, hook.remove_when, hook.when))
    if hook.patch:
        assert (PATCHES / f"{hook.patch}.patch").is_file()


@each_hook
@pytest.mark.usefixtures("without_hooks")
def test_install_twice_is_once_and_undo_restores_the_object(hook: Hook) -> None:
    owner, name = hook.owner_and_name
    original = getattr(owner, name)
    install([hook])
    replacement = getattr(owner, name)
    assert replacement is not original
    install([hook])
    assert getattr(owner, name) is replacement
    assert hook.original() is original
    undo([hook])
    assert getattr(owner, name) is original


@pytest.mark.usefixtures("without_hooks")
def test_changed_signature_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """For users who asked for emssd, at the first hook that does not fit."""
    from vllm.sampling_params import SamplingParams

    vllm_emssd.register()
    monkeypatch.setattr(SamplingParams, "_validate_spec_decode", lambda self: None)
    asked = EngineArgs(model=TARGET, speculative_config={"method": "emssd"})
    with pytest.raises(RuntimeError, match="_validate_spec_decode takes") as caught:
        asked.create_engine_config()
    assert str(SUPPORTED_VLLM) in str(caught.value)


@pytest.mark.usefixtures("without_hooks")
@pytest.mark.parametrize("method", ["emssd", "ngram"])
def test_hooks_of_serving_come_with_a_config(method: str) -> None:
    """From another process, to one that has loaded no plugin."""
    vllm_emssd.register()
    asked = {"method": method} | ({} if method == "emssd" else NGRAM)
    args = EngineArgs(model=TARGET, speculative_config=asked)
    pickled = pickle.dumps(args.create_engine_config())
    undo(INVENTORY)
    config = pickle.loads(pickled)
    installed = [hook for hook in INVENTORY if is_installed(hook)]
    assert installed == (list(SERVING_HOOKS) if method == "emssd" else [])
    assert (tag_of(config.speculative_config) is not None) == (method == "emssd")


@pytest.mark.usefixtures("without_hooks")
def test_changed_front_end_switches_the_plugin_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then vLLM keeps serving users who did not ask for emssd."""

    def drifted(self: EngineArgs, config: Any) -> None: ...

    monkeypatch.setattr(EngineArgs, "create_speculative_config", drifted)
    warnings: list[str] = []
    monkeypatch.setattr(
        "logging.Logger.warning", lambda log, text, *args: warnings.append(text % args)
    )
    vllm_emssd.register()
    assert EngineArgs.create_speculative_config is drifted
    assert any(str(SUPPORTED_VLLM) in text for text in warnings)


@pytest.mark.usefixtures("without_hooks")
def test_copies_are_scheduled_synchronously_whatever_vllm_would_choose() -> None:
    """vLLM 0.33 leaves async scheduling on for unpadded batches on its V2 runner."""
    vllm_emssd.register()
    args = EngineArgs(model=TARGET, speculative_config={"method": "emssd"})
    assert args.async_scheduling is None
    args.create_speculative_config(args.create_model_config(), ParallelConfig())
    assert args.async_scheduling is False


# ---------------------------------------------------------- what doctor prints


@pytest.mark.usefixtures("without_hooks")
def test_description_tells_each_state() -> None:
    install([FRONTEND_HOOK])
    assert "state:       in place" in describe(FRONTEND_HOOK)
    assert "state:       not in place here" in describe(VALIDATION_HOOK)
    drifted = dataclasses.replace(VALIDATION_HOOK, signature="self, other")
    text = describe(drifted)
    assert "state:       does not fit" in text
    for part in (difference(drifted), drifted.when, drifted.why, drifted.remove_when):
        assert part in text
    assert f"patches/{drifted.patch}.patch" in text
