"""What the host does in a step: operators dispatched, kernels launched, waits."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

REPLAY = "graph replay"
KERNEL = "kernel launch"
_WAITING = ("_local_scalar_dense", "nonzero", "item", "masked_select", "is_nonzero")
# What moves data between host and device; a CPU's tensors do it without an operator.
_MOVING = ((torch.Tensor, "cpu"), (torch.Tensor, "numpy"), (torch.Tensor, "tolist"))
_MAKING = ((torch, "from_numpy"), (torch, "tensor"), (torch, "as_tensor"))


class HostWork(TorchDispatchMode):
    """Counts calls while it is entered: operators by name, kernels and graph replays as
    one each, whatever happens in them.

    `waits` are the calls for which a host with a device would wait, or which move data
    between the two: values and shapes that depend on a tensor's content, copies to the
    host, tensors made on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.waits: list[str] = []
        self._depth = 0  # of what counts as one

    @property
    def total(self) -> int:
        return self.calls.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self._depth == 0:
            name = func._schema.name.removeprefix("aten::")
            self.calls[name] += 1
            if name.rstrip("_") in _WAITING or _is_masked_index(name, args):
                self.waits.append(name)
        return func(*args, **kwargs or {})

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """What is called in here counts as one."""
        if self._depth == 0:
            self.calls[name] += 1
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def counts_as_one(
        self, function: Callable[..., Any], name: str
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.as_one(name):
                return function(*args, **kwargs)

        return counted

    def notes_waiting(self, function: Callable[..., Any], name: str) -> Any:
        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:
                self.waits.append(name)
            return function(*args, **kwargs)

        return noted


def _is_masked_index(name: str, args: Any) -> bool:
    """Indexing by a mask asks the device how many there are."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(i is not None and i.dtype == torch.bool for i in args[1])


@contextmanager
def counting(work: HostWork) -> Iterator[HostWork]:
    """Counts, kernels of the interpreter too."""
    with pytest.MonkeyPatch.context() as patch, work:
        launch = work.counts_as_one(GridExecutor.__call__, KERNEL)
        patch.setattr(GridExecutor, "__call__", launch)
        for owner, name in (*_MOVING, *_MAKING):
            patch.setattr(owner, name, work.notes_waiting(getattr(owner, name), name))
        yield work
