"""Proposers that other packages bring, by entry points of the group
`vllm_emssd.proposers`. CONTRIBUTING.md shows one."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol, cast

from vllm_emssd.config import PROPOSER_GROUP, EmssdConfig, plugin_proposers
from vllm_emssd.proposers.base import Proposer
from vllm_emssd.proposers.copy_lengths import CopyLengths


class MakeProposer(Protocol):
    """What an entry point names: a class or a function."""

    def __call__(self, config: EmssdConfig, lengths: CopyLengths) -> Proposer: ...


def plugin_proposer(name: str) -> MakeProposer | None:
    """Loads the entry point of that name; None where no package brings it.

    Raises: whatever importing it raises; RuntimeError where two packages bring it.
    """
    if name not in plugin_proposers():
        return None
    found = entry_points(group=PROPOSER_GROUP, name=name)
    if len({entry.value for entry in found}) > 1:
        places = ", ".join(sorted(entry.value for entry in found))
        raise RuntimeError(
            f"proposer {name!r} is brought by several packages: {places}. "
            "Uninstall all but one."
        )
    return cast(MakeProposer, next(iter(found)).load())
