"""What a draft forward of ragged rows is given; and what samples drafts."""

from __future__ import annotations

from itertools import chain
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

BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_REQS = 4, 40, 6
LAYERS = ["draft.0", "draft.1"]


class Model:
    """Records what it is run with; its logits are of token position + 1."""

    def __call__(self, input_ids: Any, positions: Any, inputs_embeds: Any) -> Any:
        context: Any = get_forward_context()
        self.slots = [context.slot_mapping[layer].tolist() for layer in LAYERS]
        self.metadata = context.attn_metadata[LAYERS[1]]
        self.input_ids, self.positions = input_ids.tolist(), positions.tolist()
        return positions.unsqueeze(1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        one_hot = torch.nn.functional.one_hot(hidden_states[:, 0] + 1, 64)
        return one_hot.to(torch.bfloat16)


def make_drafter(block_table: np.ndarray) -> tuple[Any, Model]:
    model = Model()
    stock: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(
            parallel_config=SimpleNamespace(
                data_parallel_size=1, use_sequence_parallel_moe=False
            ),
            compilation_config=SimpleNamespace(
                fast_moe_cold_start=False, static_forward_context={}
            ),
        ),
        max_num_tokens=256,
        kv_cache_gid=0,
        device=torch.device("cpu"),
        block_size=BLOCK_SIZE,
        input_ids=torch.zeros(256, dtype=torch.int32),
        positions=torch.zeros(256, dtype=torch.int64),
        model=model,
        use_local_argmax_reduction=False,
        _enable_probabilistic_draft_probs=False,
        _determine_batch_execution_and_padding=lambda n: (CUDAGraphMode.NONE, n, None),
        _get_slot_mapping=lambda n, slots: dict.fromkeys(LAYERS, slots),
        build_per_group_and_layer_attn_metadata=lambda common: (
            [],
            dict.fromkeys(LAYERS, common),
        ),
    )
    tables = SimpleNamespace(np=block_table, gpu=torch.from_numpy(block_table))
    input_batch: Any = SimpleNamespace(
        max_num_reqs=MAX_NUM_REQS,
        block_table=[SimpleNamespace(block_table=tables)],
        sampling_metadata=SimpleNamespace(all_greedy=True),
    )
    return PagedDrafter(stock, input_batch, {}, MAX_MODEL_LEN), model


SPANS = st.lists(
    st.none() | st.tuples(st.integers(0, MAX_MODEL_LEN - 4), st.integers(1, 4)),
    min_size=1,
    max_size=MAX_NUM_REQS,
).filter(any)


@settings(max_examples=60, deadline=None)
@given(SPANS, st.randoms())
def test_rows_go_to_their_requests_blocks_and_attend_to_their_texts(
    spans: list[tuple[int, int] | None], dice: Any
) -> None:
    """`spans`: of each request in the batch, where its rows begin and how many."""
    num_blocks = MAX_MODEL_LEN // BLOCK_SIZE
    blocks = list(range(MAX_NUM_REQS * num_blocks))
    dice.shuffle(blocks)
    table = np.array(blocks, dtype=np.int32).reshape(MAX_NUM_REQS, num_blocks)
    drafter, seen = make_drafter(table)
    fed = [i for i, span in enumerate(spans) if span]
    starts, lens = np.array([span for span in spans if span]).T
    rows = RaggedRows.from_spans(np.array(fed), starts, starts + lens)
    token_ids = np.arange(rows.num_rows, dtype=np.int32)
    drafted, _ = drafter.forward(rows, token_ids, rows.last_rows, 0)

    ends = [int(end) for end in starts + lens]
    assert drafted.tolist() == ends
    assert seen.input_ids == token_ids.tolist()
    owners = np.repeat(fed, lens).tolist()
    slots = [
        table[owner, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        for owner, at in zip(owners, seen.positions, strict=True)
    ]
    texts = [range(s, s + n) for s, n in zip(starts, lens, strict=True)]
    assert seen.positions == list(chain.from_iterable(texts))
    assert seen.slots == [slots, slots]
    metadata = seen.metadata
    assert metadata.seq_lens.tolist() == ends
    assert metadata.block_table_tensor.tolist() == table[fed].tolist()
    assert metadata.query_start_loc.tolist() == [0, *lens.cumsum().tolist()]
    assert (metadata.max_query_len, metadata.max_seq_len) == (max(lens), max(ends))


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
    drafter: Any = PagedDrafter(made, input_batch, {}, 64)  # type: ignore[arg-type]
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
    drafter.returns_confidence = True
    logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
    _, _, confidence = drafter._sample(logits, np.arange(2))
    assert confidence.tolist() == pytest.approx([0.5, 1.0])
