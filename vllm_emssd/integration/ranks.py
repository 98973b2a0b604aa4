"""What the workers of one engine (its tensor-parallel ranks) tell each other.

Over the group's CPU collectives, so that no device waits. Data-parallel engines need
not agree: each has its own requests and its own prices.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.distributed import get_tp_group


class Ranks:
    """The workers of one engine; the first one's numbers count."""

    def __init__(self) -> None:
        group = get_tp_group()
        self.is_alone: bool = group.world_size == 1
        self.is_first: bool = group.is_first_rank
        self._num_ranks = group.world_size
        self._first: int = group.ranks[0]
        self._group = group.cpu_group

    def of_first(self, values: np.ndarray) -> np.ndarray:
        """The first rank's values, on every rank. Any shape, the same everywhere;
        float64."""
        shared = torch.from_numpy(np.array(values, dtype=np.float64))
        torch.distributed.broadcast(shared, src=self._first, group=self._group)
        return np.asarray(shared.numpy())

    def compare(self, fingerprint: int) -> None:
        """Raise RuntimeError, on every rank, unless all have the same fingerprint."""
        mine = torch.tensor([fingerprint], dtype=torch.int64)
        gathered = [torch.empty_like(mine) for _ in range(self._num_ranks)]
        torch.distributed.all_gather(gathered, mine, group=self._group)
        fingerprints = [int(each) for each in gathered]
        if len(set(fingerprints)) > 1:
            raise RuntimeError(
                "vllm-emssd: the tensor-parallel ranks of this engine decided "
                f"differently on draft lengths (fingerprints by rank: {fingerprints}). "
                "Going on would hang the engine, so it stops. Ranks must run the same "
                "versions on the same kind of processor; if they do, this is a bug: "
                'please report it, and use "draft_length": "fixed" meanwhile.'
            )
