"""How sure a drafter is of a draft, which automatic lengths go by."""

from __future__ import annotations

import torch


def highest_probability(logits: torch.Tensor) -> torch.Tensor:
    """Of each row's softmax, 0 of a row with NaN or infinite logits.

    `logits`: [num_rows, vocab_size]; returns [num_rows] float32, on the same device.
    """
    highest = logits.softmax(dim=-1, dtype=torch.float32).amax(dim=-1)
    return highest.nan_to_num(nan=0.0)
