"""Training steps bring draft models and EAGLE heads closer to their target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from models.make.distillation import acceptance, distillation_loss, train
from models.make.eagle3_head import Eagle3Head
from models.make.train_eagle3 import Unrolled, in_random_order, windows
from tests.tiny_llama import SIZES, tiny_llama

TEXT = np.random.default_rng(0).integers(0, SIZES["vocab_size"], 2000)
STEPS = 40


@pytest.fixture
def target() -> LlamaForCausalLM:
    target = tiny_llama()
    target.model.norm.weight.data.fill_(10)  # it is sure of its tokens
    return target.requires_grad_(False)


def test_distillation_brings_the_draft_model_closer(target: LlamaForCausalLM) -> None:
    draft, [batch] = tiny_llama(seed=1), windows(TEXT, 0, 1, 4)
    before = acceptance(draft, target, [batch])
    train(draft, distillation_loss(draft, target), [batch] * STEPS, STEPS)
    after = acceptance(draft, target, [batch])
    for name, share in after.items():
        assert share > before[name] + 0.1


def test_training_brings_all_drafts_of_a_head_closer(target: LlamaForCausalLM) -> None:
    """Also where it can draft half of the tokens only."""
    head = Eagle3Head(target, [1, 2], 64, torch.arange(0, SIZES["vocab_size"], 2))
    unrolled, batches = Unrolled(head, target, depth=2), windows(TEXT, 0, 2, 4)
    before = unrolled.agreement(batches)
    train(head, unrolled.loss, in_random_order(batches), STEPS)
    after = unrolled.agreement(batches)
    assert all(a > b + 0.05 for a, b in zip(after, before, strict=True)), after
