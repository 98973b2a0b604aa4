"""Hooks taken away for a test: an earlier one may have left them in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm.plugins import load_general_plugins

from vllm_emssd.integration.hooks.hook import Hook, install, is_installed, undo


@contextmanager
def without(taken: Sequence[Hook]) -> Iterator[None]:
    """As in a process that has not loaded the plugin; afterwards as it was before."""
    load_general_plugins()  # once a process: in the block it would be undone
    ours = [hook for hook in taken if is_installed(hook)]
    undo(ours)
    try:
        yield
    finally:
        undo(taken)
        install(ours)
