"""Shared memory of the CPU's collectives: names that nobody needs any more.

vLLM's CPU workers of one machine share a segment each, named in /dev/shm, and remove
the name when they end in good order. But Ray ends them by a kill, and any may die:
names stay, and the memory with them, until the machine restarts. Once all workers have
opened the segments the names are of no use, so they are removed at the start.
"""

from __future__ import annotations

from pathlib import Path

from vllm.distributed import get_tp_group
from vllm.distributed.device_communicators.cpu_communicator import (
    CpuCommunicator,
    _CPUSHMDistributed,
)

SHARED_MEMORY = Path("/dev/shm")


def remove_names() -> None:
    """To be called after the group is made, which waits for all to have joined."""
    group = get_tp_group()
    communicator = group.device_communicator
    if not isinstance(communicator, CpuCommunicator):
        return
    collectives = communicator.dist_module
    if isinstance(collectives, _CPUSHMDistributed):
        name = f"{collectives.group_name}_{group.rank_in_group}"
        (SHARED_MEMORY / name).unlink(missing_ok=True)
