"""Greedy drafts are taken by `max`, which must say what `argmax` says; others are
vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_emssd.integration.v1.drafter import PagedDrafter

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


def drafter_over(stock: dict[str, Any], all_greedy: bool) -> tuple[PagedDrafter, Any]:
    """Over a stand-in for vLLM's draft-model object; and the batch's metadata."""
    metadata = SimpleNamespace(all_greedy=all_greedy)
    defaults = {
        "max_num_tokens": 8,
        "kv_cache_gid": 0,
        "use_local_argmax_reduction": False,
        "_enable_probabilistic_draft_probs": False,
        "model": SimpleNamespace(compute_logits=lambda hidden_states: hidden_states),
        "_sample_from_logits": lambda logits, metadata: ("sampled", "probs"),
        "_sample_draft_tokens": lambda hidden_states, metadata: ("local", None),
    }
    input_batch = SimpleNamespace(block_table=[None], sampling_metadata=metadata)
    made: Any = SimpleNamespace(**defaults | stock)
    return PagedDrafter(made, None, input_batch, {}, 64), metadata  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stock", "all_greedy", "drafted"),
    [
        ({}, True, None),
        ({}, False, None),  # greedy drafts for sampled requests
        ({"_enable_probabilistic_draft_probs": True}, True, None),
        ({"_enable_probabilistic_draft_probs": True}, False, ("sampled", "probs")),
        ({"use_local_argmax_reduction": True}, True, ("local", None)),
    ],
)
def test_who_samples(
    stock: dict[str, Any], all_greedy: bool, drafted: tuple[str, str | None] | None
) -> None:
    drafter, metadata = drafter_over(stock, all_greedy)
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    tokens, probs = drafter._sample_after(logits, metadata)
    if drafted is None:
        assert (tokens.tolist(), probs) == ([1, 0], None)
    else:
        assert (tokens, probs) == drafted
