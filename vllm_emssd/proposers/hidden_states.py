"""The target's hidden states of the last tokens it computed, for an EAGLE head.

The head may be fed them in the same step or, where nothing is drafted for a while, much
later. They are found by the slot of the KV cache that belongs to their token, so where
its K/V is right, so are they, unless newer ones took their room.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

MAX_BYTES = 256 << 20  # of the buffer, unless a step's own tokens need more
_NONE = -(1 << 62)  # older than all


class HiddenStates:
    """Numbered in the order in which they came; the newest are in a ring buffer.

    Args:
        num_blocks, block_size: of the KV cache.
        max_num_tokens: most tokens of a step, all of which must find room.
        max_bytes: of the buffer; made with the first states, whose width it has.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_tokens: int,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._max_num_tokens = max_num_tokens
        self._max_bytes = max_bytes
        self._num_kept = 0  # ever, those left out at the buffer's end among them
        self._buffer = torch.empty(0)  # [rows, width]
        self._number_of = torch.full((num_blocks, block_size), _NONE)  # by KV slot

    def keep(self, states: Sequence[torch.Tensor], kv_slots: torch.Tensor) -> None:
        """Take in those of a step's rows, rejected drafts and all.

        Args:
            states: [at least num_rows, any width] each; put side by side.
            kv_slots: [num_rows] int64.
        """
        num_rows = len(kv_slots)
        if not len(self._buffer):
            self._make_buffer(states)
        start = self._num_kept % len(self._buffer)
        if start + num_rows > len(self._buffer):
            self._num_kept += len(self._buffer) - start
            start = 0
        torch.cat(
            [of_layer[:num_rows] for of_layer in states],
            dim=-1,
            out=self._buffer[start : start + num_rows],
        )
        end = self._num_kept + num_rows
        numbers = torch.arange(self._num_kept, end, device=kv_slots.device)
        self._number_of.view(-1)[kv_slots] = numbers
        self._num_kept = end

    def are_here(self, kv_slots: np.ndarray) -> np.ndarray:
        """Whether the states of these slots are. [num_slots] int64 -> bool"""
        numbers = self._numbers(torch.from_numpy(kv_slots))
        return (numbers >= self._num_kept - len(self._buffer)).cpu().numpy()

    def of(self, kv_slots: torch.Tensor) -> torch.Tensor:
        """[num_slots] int64 -> [num_slots, width]"""
        return self._buffer[self._numbers(kv_slots) % len(self._buffer)]

    def forget(self, block_ids: Sequence[int]) -> None:
        """Blocks are allocated for new content."""
        if block_ids:
            self._number_of[torch.tensor(block_ids)] = _NONE

    def _numbers(self, kv_slots: torch.Tensor) -> torch.Tensor:
        numbers = self._number_of.view(-1)
        return numbers[kv_slots.to(numbers.device)]

    def _make_buffer(self, states: Sequence[torch.Tensor]) -> None:
        width = sum(of_layer.shape[-1] for of_layer in states)
        some = states[0]
        affordable = self._max_bytes // (width * some.element_size())
        num_rows = max(affordable, self._max_num_tokens)
        self._buffer = some.new_zeros(num_rows, width)  # which touches its pages
        self._number_of = self._number_of.to(some.device)
