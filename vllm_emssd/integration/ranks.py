"""What the workers of one engine (its tensor-parallel ranks) tell each other.

Data-parallel engines need not agree: each has its own requests and its own costs.
"""

from __future__ import annotations

import zlib
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tp_group


class Ranks:
    """The workers of one engine; the first one's numbers count."""

    def __init__(self, device: torch.device) -> None:
        self._group = group = get_tp_group()
        self._device = device
        self.is_alone: bool = group.world_size == 1
        self._first: int = group.ranks[0]
        self._fingerprint = 0  # of all decisions so far

    def of_first(self, value: Any) -> Any:
        """A copy of the first rank's value, on every rank."""
        shared = [deepcopy(value)]
        torch.distributed.broadcast_object_list(
            shared, src=self._first, group=self._group.cpu_group
        )
        return shared[0]

    def check_agreement(self, decision: np.ndarray) -> None:
        """Compare a decision, integers or booleans of any shape, before it is acted on:
        a rank that fed other rows to the drafter would hang the next collective, or
        spoil its sums.

        By the models' own collectives: on CPUs of one machine these go through shared
        memory, tens of times faster than the CPU group's sockets, but take floats only,
        so the 32 bits of a fingerprint travel as two halves.

        Raises: RuntimeError, on every rank, unless all have decided alike so far.
        """
        data = np.ascontiguousarray(decision, dtype=np.int64).tobytes()
        self._fingerprint = zlib.crc32(data, self._fingerprint)
        halves = torch.tensor(divmod(self._fingerprint, 1 << 16), dtype=torch.float32)
        gathered = self._group.all_gather(halves.to(self._device), dim=0)
        pairs = gathered.view(-1, 2).tolist()  # sync: no rank goes on before all agree
        fingerprints = [(int(high) << 16) + int(low) for high, low in pairs]
        if len(set(fingerprints)) > 1:
            raise RuntimeError(
                "vllm-emssd: the tensor-parallel ranks of this engine decided "
                f"differently on draft lengths (fingerprints by rank: {fingerprints}). "
                "Going on would hang the engine, so it stops. Ranks must run the same "
                "versions on the same kind of processor; if they do, this is a bug: "
                'please report it, and use "draft_length": "fixed" meanwhile.'
            )
