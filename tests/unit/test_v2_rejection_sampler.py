"""The V2 runner's rejection sampler keeps no logits: large batches come in chunks, of
which one at a time may be in memory."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_emssd.integration.v2.rejection_sampler import (
    RejectionSampler,
    UnpadRejectionSamplerV2,
)


def test_the_logits_of_a_chunk_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(self: Any, logits: torch.Tensor, *args: Any) -> Any:
        return logits + 1, torch.zeros(2, 3), torch.ones(2)

    monkeypatch.setattr(RejectionSampler, "_verify", verify)
    states = SimpleNamespace(seeds_set=np.zeros(2, dtype=bool))
    config: Any = SimpleNamespace(
        num_speculative_tokens=2,
        enable_adaptive_verification=False,
        rejection_sample_method="standard",
    )
    stock: Any = SimpleNamespace(sampling_states=states)
    sampler = UnpadRejectionSamplerV2(stock, config, torch.device("cpu"))
    args: list[Any] = [None] * 10
    args[5] = np.arange(2)
    processed, _, _ = sampler._verify(torch.zeros(6, 10), *args)
    seen = weakref.ref(processed)
    del processed
    assert seen() is None
