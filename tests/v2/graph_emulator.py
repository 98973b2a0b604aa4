"""CUDA graphs in slow motion: what a function launched is noted with the memory it read
and wrote, and done again on whatever that memory holds by then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

_LOOKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")


class EmulatedGraph(TorchDispatchMode):
    """As with a real one, numbers of the host are those of the recording, and so are
    addresses. Raises RuntimeError where the recorded function looks into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._launches: list[Callable[[], object]] = []
        self._in_kernel = False

    def record(self, function: Callable[[], object]) -> None:
        launch, graph = GridExecutor.__call__, self

        def noted(self: Any, *args: Any, **kwargs: Any) -> None:
            def again() -> None:
                launch(self, *args, **kwargs)

            graph._launches.append(again)
            graph._in_kernel = True
            again()
            graph._in_kernel = False

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(GridExecutor, "__call__", noted)
            function()

    def replay(self) -> None:
        for launch in self._launches:
            launch()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._in_kernel and func._schema.name in _LOOKS:
            raise RuntimeError(f"{func} cannot be recorded")
        made = func(*args, **kwargs)
        if self._in_kernel:
            return made
        if func._schema.is_mutable:
            self._launches.append(lambda: func(*args, **kwargs))
        elif not _shares_memory(made, (args, kwargs)):
            self._launches.append(lambda: _refill(made, func(*args, **kwargs)))
        return made


def _shares_memory(made: Any, given: Any) -> bool:
    """Of a view: nothing is launched for it."""
    addresses = [
        {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves(tree)
            if isinstance(leaf, torch.Tensor)
        }
        for tree in (made, given)
    ]
    return bool(addresses[0] & addresses[1])


def _refill(recorded: Any, made: Any) -> None:
    """What is made anew goes where the recorded one is."""
    for old, new in zip(tree_leaves(recorded), tree_leaves(made), strict=True):
        if isinstance(old, torch.Tensor):
            old.copy_(new)
