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
SYNCHRONIZE = "synchronize"
_SYNCHRONIZING = ((torch.cuda, SYNCHRONIZE), (torch.accelerator, SYNCHRONIZE))


class HostWork(TorchDispatchMode):
    """Counts calls while it is entered: operators by name, kernels and graph replays as
    one each, whatever happens in them.

    `waits` are the calls for which a host with a device would wait, or which move data
    between the two: values and shapes that depend on a tensor's content, copies to the
    host, tensors made on it, events and streams waited for. Not seen are copies into
    tensors that are there already, and indices made on the host. Fake tensors on a
    device that is not there would tell of these, but the kernels need real ones.
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

    def notes_waiting(
        self,
        function: Callable[..., Any],
        name: str,
        waits: Callable[..., bool] = lambda *args, **kwargs: True,
    ) -> Any:
        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0 and waits(*args, **kwargs):
                self.waits.append(name)
            return function(*args, **kwargs)

        return noted

    def notes_synchronizing(self) -> Any:
        """In place of an event's `__getattribute__`: those of a CPU have no method."""

        def noted(event: Any, name: str) -> Any:
            if name == SYNCHRONIZE and self._depth == 0:
                self.waits.append(name)
            return object.__getattribute__(event, name)

        return noted


def _is_masked_index(name: str, args: Any) -> bool:
    """Indexing by a mask asks the device how many there are."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(i is not None and i.dtype == torch.bool for i in args[1])


def _is_waiting_copy(
    tensor: Any, *args: Any, non_blocking: bool = False, **kwargs: Any
) -> bool:
    """Of `Tensor.to`: it is for a device."""
    asked = (*args[:1], kwargs.get("device"))
    return not non_blocking and any(isinstance(d, str | torch.device) for d in asked)


@contextmanager
def counting(work: HostWork) -> Iterator[HostWork]:
    """Counts, kernels of the interpreter too."""
    with pytest.MonkeyPatch.context() as patch, work:
        launch = work.counts_as_one(GridExecutor.__call__, KERNEL)
        patch.setattr(GridExecutor, "__call__", launch)
        for owner, name in (*_MOVING, *_MAKING, *_SYNCHRONIZING):
            patch.setattr(owner, name, work.notes_waiting(getattr(owner, name), name))
        to = work.notes_waiting(torch.Tensor.to, "to", _is_waiting_copy)
        patch.setattr(torch.Tensor, "to", to)
        for waited_for in (torch.cuda.Event, torch.cuda.Stream):
            patch.setattr(waited_for, "__getattribute__", work.notes_synchronizing())
        yield work
