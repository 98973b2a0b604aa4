"""Draft forwards made at once, against each made by itself; and what samples drafts."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_emssd.integration.v1.drafter import PagedDrafter
from vllm_emssd.ragged import RaggedRows

BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_REQS, K = 4, 40, 6, 5
LAYERS = ["draft.0", "draft.1"]


class Model:
    """Records what it is run with; its logits are of token position + 1."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, input_ids: Any, positions: Any, inputs_embeds: Any) -> Any:
        context = get_forward_context()
        metadata = context.attn_metadata["draft.1"]  # type: ignore[index,call-overload]
        self.seen.append(
            {
                "input_ids": input_ids.tolist(),
                "positions": positions.tolist(),
                "slots": [
                    context.slot_mapping[layer].tolist()  # type: ignore[index,call-overload]
                    for layer in LAYERS
                ],
                "metadata": {
                    field.name: _plain(getattr(metadata, field.name))
                    for field in dataclasses.fields(metadata)
                },
                "moe_layer_index": context.moe_layer_index,
            }
        )
        context.moe_layer_index += 1
        return positions.unsqueeze(1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        one_hot = torch.nn.functional.one_hot(hidden_states[:, 0] + 1, 64)
        return one_hot.to(torch.bfloat16)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def make_drafter(block_table: np.ndarray) -> tuple[PagedDrafter, Model]:
    model = Model()
    stock = SimpleNamespace(
        max_num_tokens=256,
        kv_cache_gid=0,
        device=torch.device("cpu"),
        block_size=BLOCK_SIZE,
        num_speculative_tokens=K,
        input_ids=torch.zeros(256, dtype=torch.int32),
        positions=torch.zeros(256, dtype=torch.int64),
        model=model,
        use_local_argmax_reduction=False,
        _enable_probabilistic_draft_probs=False,
        _draft_attn_layer_names=set(LAYERS),
        _determine_batch_execution_and_padding=lambda n: (CUDAGraphMode.NONE, n, None),
        _get_slot_mapping=lambda n, slots: dict.fromkeys(LAYERS, slots),
        build_per_group_and_layer_attn_metadata=lambda common: (
            [],
            dict.fromkeys(LAYERS, dataclasses.replace(common)),
        ),
    )
    tables = SimpleNamespace(np=block_table, gpu=torch.from_numpy(block_table))
    input_batch = SimpleNamespace(
        max_num_reqs=MAX_NUM_REQS,
        block_table=[SimpleNamespace(block_table=tables)],
        sampling_metadata=SimpleNamespace(all_greedy=True),
    )
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=1, use_sequence_parallel_moe=False
        ),
        compilation_config=SimpleNamespace(
            fast_moe_cold_start=False, static_forward_context={}
        ),
    )
    drafter: Any = PagedDrafter(
        stock,  # type: ignore[arg-type]
        vllm_config,  # type: ignore[arg-type]
        input_batch,  # type: ignore[arg-type]
        {},
        MAX_MODEL_LEN,
    )
    return drafter, model


STARTS = st.lists(st.integers(0, MAX_MODEL_LEN - 4), min_size=1, max_size=MAX_NUM_REQS)


@settings(max_examples=60, deadline=None)
@given(STARTS, st.randoms())
def test_forwards_made_at_once_are_those_made_one_by_one(
    starts: list[int], dice: Any
) -> None:
    """Two steps; requests stop at different drafts."""
    num_blocks = MAX_MODEL_LEN // BLOCK_SIZE
    blocks = list(range(MAX_NUM_REQS * num_blocks))
    dice.shuffle(blocks)
    block_table = np.array(blocks, dtype=np.int32).reshape(MAX_NUM_REQS, num_blocks)
    (at_once, seen), (singly, wanted) = (make_drafter(block_table) for _ in range(2))
    for _ in range(2):
        active = np.arange(len(starts))
        begins = np.array(starts)
        ends = begins + np.array([dice.randint(1, 3) for _ in starts])
        rows = RaggedRows.from_spans(active, begins, ends)
        tokens: Any = rows.positions.astype(np.int32)
        sampled = rows.last_rows
        for position in range(K):
            singly._context = None
            for drafter in (at_once, singly):
                drafted, _ = drafter.forward(rows, tokens, sampled, position)
                assert drafted.tolist() == (rows.positions[sampled] + 1).tolist()
            goes_on = [
                dice.random() < 0.7 and ends[i] + position < MAX_MODEL_LEN
                for i in active
            ]
            active, tokens = active[goes_on], drafted[goes_on]
            if not active.size:
                break
            rows = RaggedRows.one_each(active, ends[active] + position)
            sampled = rows.last_rows
    assert seen.seen == wanted.seen


def drafter_over(stock: dict[str, Any], all_greedy: bool) -> Any:
    """Over a stand-in for vLLM's draft-model object."""
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
    input_batch = SimpleNamespace(
        max_num_reqs=2, block_table=[None], sampling_metadata=metadata
    )
    made: Any = SimpleNamespace(**defaults | stock)
    drafter: Any = PagedDrafter(made, None, input_batch, {}, 64)  # type: ignore[arg-type]
    drafter._draft_sampling_metadata = lambda req_indices: metadata
    return drafter


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
def test_which_sampler_drafts(
    stock: dict[str, Any], all_greedy: bool, drafted: tuple[str, str | None] | None
) -> None:
    drafter = drafter_over(stock, all_greedy)
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    tokens, probs, confidence = drafter._sample(logits, np.arange(2))
    assert confidence is None
    if drafted is None:
        assert (tokens.tolist(), probs) == ([1, 0], None)
    else:
        assert (tokens, probs) == drafted


@pytest.mark.parametrize(
    ("stock", "all_greedy"),
    [
        ({"use_local_argmax_reduction": True}, True),
        (
            {
                "_enable_probabilistic_draft_probs": True,
                "_sample_from_logits": lambda logits, metadata: (logits.zero_(), None),
            },
            False,
        ),
    ],
)
def test_confidences_are_the_logits_own(
    stock: dict[str, Any], all_greedy: bool
) -> None:
    """Also where sampling changes the logits in place."""
    drafter = drafter_over(stock, all_greedy)
    drafter.tells_confidence = True
    logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
    _, _, confidence = drafter._sample(logits, np.arange(2))
    assert confidence.tolist() == pytest.approx([0.5, 1.0])
