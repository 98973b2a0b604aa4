"""Greedy drafts are taken by `max`, which must say what `argmax` says."""

from __future__ import annotations

import pytest
import torch

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_takes_the_first_of_equals_as_argmax_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 9, (64, 2000), generator=generator).to(dtype)
    assert torch.equal(coarse.max(dim=-1).indices, coarse.argmax(dim=-1))
    assert (coarse.max(dim=-1).indices < 100).all()  # equals there were


@pytest.mark.parametrize(
    ("row", "index"),
    [
        ([0.0, NAN, 1.0, NAN], 1),
        ([-INF, -INF, -INF], 0),
        ([1.0, INF, INF], 1),
        ([-0.0, 0.0], 0),
    ],
)
def test_max_of_odd_rows(row: list[float], index: int) -> None:
    logits = torch.tensor([row])
    assert logits.argmax(dim=-1).item() == index
    assert logits.max(dim=-1).indices.item() == index
