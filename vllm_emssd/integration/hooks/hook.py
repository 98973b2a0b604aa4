"""Replacing a name of vLLM's, where it offers no extension point.

Every replacement in the plugin is a `Hook`, listed in `hook_inventory.py`. If vLLM
changed a signature, the start stops. Hooks are installed all or none; installing twice
does nothing more, and `undo` restores the original object.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm_emssd.integration.hooks.compat import SUPPORTED_VLLM


@dataclass(frozen=True, slots=True)
class Hook:
    """One name of vLLM's and what takes its place."""

    target: str  # "module:Class.attribute"
    why: str
    signature: str  # of the original, as inspect prints its parameter names
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


def difference(hook: Hook) -> str:
    """What differs in this vLLM so that the hook cannot be installed, and the versions
    that fit; "" where it can."""
    try:
        found = ", ".join(inspect.signature(hook.original()).parameters)
    except (ImportError, AttributeError) as error:
        what = f"is missing ({error})"
    else:
        if found == hook.signature:
            return ""
        what = f"takes ({found}), expected ({hook.signature})"
    return (
        f"vllm-emssd: {hook.target} {what}. This vLLM differs from the ones the plugin "
        f"was written against ({SUPPORTED_VLLM}); install one of those, or a newer "
        "vllm-emssd."
    )


def install(hooks: Sequence[Hook]) -> None:
    """Install all hooks or, where one does not fit this vLLM, none. Idempotent.

    Raises: RuntimeError with its `difference`.
    """
    for hook in hooks:
        if differs := difference(hook):
            raise RuntimeError(differs)
    for hook in hooks:
        if not is_installed(hook):
            owner, name = hook.owner_and_name
            original = getattr(owner, name)
            setattr(owner, name, hook.make(original))
            _originals[hook.target] = original


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
