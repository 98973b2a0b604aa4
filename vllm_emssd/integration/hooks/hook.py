"""Replacing a name of vLLM's, where it offers no extension point.

Every replacement in the plugin is a `Hook` (all are listed in `inventory.py`): what is
replaced, why, the signature it was written against, and what would remove it. A changed
signature stops the start; a set of hooks is installed wholly or not at all; installing
twice is installing once; undo restores the original object.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from vllm_emssd.integration.hooks.compat import SUPPORTED_VLLM


@dataclass(frozen=True, slots=True)
class Hook:
    """One name of vLLM's and what takes its place."""

    target: str  # "module:Class.attribute"
    why: str
    signature: str  # of the original, as inspect prints its parameter names
    upstream: str  # the change that would make the hook unnecessary
    remove_when: str
    make: Callable[[Any], Any]  # original -> replacement
    when: str = ""  # it is in place
    patch: str = ""  # the change offered to vLLM, a file name of patches/

    @property
    def owner_and_name(self) -> tuple[Any, str]:
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name

    def original(self) -> Any:
        """Raises ImportError or AttributeError where vLLM has no such name."""
        owner, name = self.owner_and_name
        return _originals.get(self.target, getattr(owner, name))


_originals: dict[str, Any] = {}  # target -> what was replaced


def parameter_names(function: Any) -> str:
    """Parameter names of a function or of a class's constructor, comma separated."""
    return ", ".join(inspect.signature(function).parameters)


def check(hook: Hook) -> None:
    """Raise RuntimeError where the target is missing or has another signature."""
    try:
        found = parameter_names(hook.original())
    except (ImportError, AttributeError) as error:
        raise RuntimeError(_drift(hook, f"is missing ({error})")) from error
    if found != hook.signature:
        raise RuntimeError(
            _drift(hook, f"takes ({found}), expected ({hook.signature})")
        )


State = Literal["in place", "ready", "changed"]


def state_of(hook: Hook) -> tuple[State, str]:
    """How a hook stands in this process, and for a changed one the difference.

    "in place"; "ready" to be installed, the signature is as expected; or "changed", so
    that it cannot be installed.
    """
    if is_installed(hook):
        return "in place", ""
    try:
        check(hook)
    except RuntimeError as error:
        return "changed", str(error)
    return "ready", ""


def install(hooks: Sequence[Hook]) -> None:
    """Install all hooks or, where one does not fit this vLLM, none. Idempotent.

    Raises: RuntimeError naming the target, what differs and the versions that fit.
    """
    for hook in hooks:
        check(hook)
    replacements = []
    for hook in hooks:
        if hook.target not in _originals:
            owner, name = hook.owner_and_name
            original = getattr(owner, name)
            replacements.append((hook, owner, name, original, hook.make(original)))
    for hook, owner, name, original, replacement in replacements:
        _originals[hook.target] = original
        setattr(owner, name, replacement)


def undo(hooks: Sequence[Hook]) -> None:
    """Put the original objects back."""
    for hook in hooks:
        if hook.target in _originals:
            owner, name = hook.owner_and_name
            setattr(owner, name, _originals.pop(hook.target))


def is_installed(hook: Hook) -> bool:
    return hook.target in _originals


@contextmanager
def installed(hooks: Sequence[Hook]) -> Iterator[None]:
    """Install for the length of a block; leaves installed hooks as they were."""
    ours = [hook for hook in hooks if not is_installed(hook)]
    install(ours)
    try:
        yield
    finally:
        undo(ours)


def _drift(hook: Hook, what: str) -> str:
    return (
        f"vllm-emssd: {hook.target} {what}. This vLLM differs from the ones the plugin "
        f"was written against ({SUPPORTED_VLLM}); install one of those, or a newer "
        "vllm-emssd."
    )
