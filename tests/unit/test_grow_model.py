"""A grown model says what the small one says."""

from __future__ import annotations

import argparse

import pytest
from transformers import LlamaForCausalLM

from models.make import grow_model
from tests.tiny_llama import tiny_llama


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def small(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = tiny_llama(**heads, intermediate_size=48, tie_word_embeddings=request.param)
    for name, weights in model.named_parameters():
        if "norm" in name:
            weights.data.uniform_(0.5, 1.5)
    return model


def arguments(**sizes: int) -> argparse.Namespace:
    asked = {"hidden_size": 96, "num_layers": 4, "intermediate_size": 80}
    return argparse.Namespace(**asked | {"query_group": 3} | sizes)


@pytest.mark.parametrize("query_group", [2, 3])
def test_same_logits(small: LlamaForCausalLM, query_group: int) -> None:
    config = grow_model.grown_config(small.config, arguments(query_group=query_group))
    large = grow_model.grow(small, config).eval()
    assert large.num_parameters() > 5 * small.num_parameters()
    assert grow_model.largest_difference(small, large) < 1e-4


def test_a_lost_weight_is_seen(small: LlamaForCausalLM) -> None:
    """The check that guards the written model can fail."""
    config = grow_model.grown_config(small.config, arguments())
    large = grow_model.grow(small, config).eval()
    large.model.layers[1].mlp.down_proj.weight.data.zero_()
    assert grow_model.largest_difference(small, large) > grow_model.TOLERANCE


def test_too_small(small: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="num_hidden_layers would shrink"):
        grow_model.grown_config(small.config, arguments(num_layers=1))
