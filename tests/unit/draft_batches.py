"""Batches as a proposer is given them, and steps as a draft-length policy is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vllm_emssd.draft_length import StepInfo
from vllm_emssd.proposers.base import DraftBatch

NOT_KNOWN = -9  # what the buffer holds beyond the known tokens, and must not be read
ROOM = 64  # places of the buffer beyond the longest text


def batch_of(
    texts: Mapping[str, Sequence[int]],
    max_draft_tokens: Sequence[int] | np.ndarray,
    is_sampling: Sequence[bool] | None = None,
    **counts: Sequence[int],
) -> DraftBatch:
    """`texts`: known tokens by request id, all sampling if not said otherwise.

    `counts`: other fields of `DraftBatch`; without them each text is a prompt that was
    scheduled whole in this step.
    """
    num_tokens = [len(text) for text in texts.values()]
    shape = (len(texts), max(num_tokens, default=0) + ROOM)
    token_ids = np.full(shape, NOT_KNOWN, dtype=np.int32)
    for row, text in zip(token_ids, texts.values(), strict=True):
        row[: len(text)] = text
    whole = ("num_prompt_tokens", "num_scheduled_tokens", "num_prefilled_tokens")
    sampling = [True] * len(texts) if is_sampling is None else is_sampling
    return DraftBatch(
        req_ids=list(texts),
        token_ids=token_ids,
        num_tokens=np.array(num_tokens, dtype=np.int64),
        is_sampling=np.array(sampling, dtype=bool),
        max_draft_tokens=np.array(max_draft_tokens, dtype=np.int64),
        **{
            name: np.array(values, dtype=np.int64)
            for name, values in (dict.fromkeys(whole, num_tokens) | counts).items()
        },
    )


def step_of(
    num_reqs: int, most: Sequence[int] | int = 4, missing: int = 1, num_prefill: int = 0
) -> StepInfo:
    """The first `num_prefill` requests are in prefill, 50 rows each."""
    is_sampling = np.arange(num_reqs) >= num_prefill
    return StepInfo(
        [f"r{i}" for i in range(num_reqs)],
        is_sampling,
        np.where(is_sampling, most, 0),
        np.full(num_reqs, missing),
        50 * num_prefill,
    )
