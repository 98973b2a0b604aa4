"""The V2 runner's rejection sampler keeps no logits: large batches come in chunks, of
which one at a time may be in memory."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from tests.v2.verification import make_sampler
from vllm_emssd.integration.v2.rejection_sampler import RejectionSampler


def test_the_logits_of_a_chunk_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(self: Any, logits: torch.Tensor, *args: Any) -> Any:
        return logits + 1, torch.zeros(2, 3), torch.ones(2)

    monkeypatch.setattr(RejectionSampler, "_verify", verify)
    sampler = make_sampler(np.array(["sampled"] * 2), np.random.default_rng(0))
    args: list[Any] = [None] * 10
    args[5] = np.arange(2)
    processed, _, _ = sampler._verify(torch.zeros(6, 10), *args)
    seen = weakref.ref(processed)
    del processed
    assert seen() is None
