"""Kernels that lay out the draft model's input from what the device knows."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
from vllm.triton_utils import tl, triton

_VOCAB_BLOCK = 4096


@triton.jit(do_not_specialize=["num_reqs", "num_rows_padded"])
def place_rows_kernel(
    idx_mapping,  # [num_reqs] int64: request states
    total_len,  # [max_num_reqs] int32, by request state: known tokens
    token_ids,  # [max_num_reqs, max_model_len] int32, by request state
    token_ids_stride,
    spans,  # [2 * num_reqs + 1] int32: first rows and their end; tokens lacking
    input_ids,
    positions,
    query_start_loc,
    seq_lens,
    out_idx_mapping,  # [max_num_reqs] int64
    draft_step,  # a number, int64
    out_num_reqs,  # a number, int64
    num_reqs,
    num_rows_padded,  # with `ROWS`
    max_num_reqs,
    last_position,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """A program a request: rows of its text, the last `ROWS` tokens or those from the
    first it lacks on. The last program, one more, sets what is for all of them, and
    clears requests and rows that padding could add."""
    i = tl.program_id(0)
    if i == num_reqs:
        if ROWS == 0:
            end = tl.load(spans + num_reqs)
        else:
            end = num_reqs * ROWS
            for first in range(end, num_rows_padded, BLOCK_SIZE):
                row = first + tl.arange(0, BLOCK_SIZE)
                is_row = row < num_rows_padded
                tl.store(input_ids + row, 0, mask=is_row)
                tl.store(positions + row, 0, mask=is_row)
        for first in range(num_reqs, max_num_reqs + 1, BLOCK_SIZE):
            req = first + tl.arange(0, BLOCK_SIZE)
            tl.store(query_start_loc + req, end, mask=req <= max_num_reqs)
            tl.store(seq_lens + req, 0, mask=req < max_num_reqs)
            tl.store(out_idx_mapping + req, -1, mask=req < max_num_reqs)
        tl.store(draft_step, 0)
        tl.store(out_num_reqs, num_reqs)
        return
    state = tl.load(idx_mapping + i)
    if ROWS == 0:
        start = tl.load(spans + i)
        num_rows = tl.load(spans + i + 1) - start
        num_lacking = tl.load(spans + num_reqs + 1 + i)
    else:
        start = i * ROWS
        num_rows = ROWS
        num_lacking = ROWS
    # Negative in vLLM's warm-up alone, whose steps overstate what was accepted.
    first_position = tl.maximum(tl.load(total_len + state) - num_lacking, 0)
    for first in range(0, num_rows, BLOCK_SIZE):
        offset = first + tl.arange(0, BLOCK_SIZE)
        is_row = offset < num_rows
        position = tl.minimum(first_position + offset, last_position).to(tl.int64)
        token = tl.load(
            token_ids + state * token_ids_stride + position, mask=is_row, other=0
        )
        tl.store(input_ids + start + offset, token, mask=is_row)
        tl.store(positions + start + offset, position, mask=is_row)
    tl.store(query_start_loc + i, start)
    tl.store(seq_lens + i, tl.minimum(first_position + num_rows, last_position + 1))
    tl.store(out_idx_mapping + i, state)


@triton.jit
def advance_kernel(
    tokens,  # [num_reqs] int64: drafted last
    last_positions,  # [num_reqs] int64: of the rows they were drafted after
    draft_tokens,  # [max_num_reqs, K] int64
    draft_tokens_stride,
    draft_step,
    num_real,  # a number, int64: requests that are not padding
    input_ids,
    positions,
    query_start_loc,
    seq_lens,
    idx_mapping,
    max_num_reqs,
    last_position,
    BLOCK_SIZE: tl.constexpr,
):
    """A program a request, padding among them: keep its draft, and go on by a row. A
    request at the end of the context writes no K/V any more. The last program, one
    more, marks the end for all requests that a larger padding could add."""
    i = tl.program_id(0)
    num_reqs = tl.load(num_real)
    if i == tl.num_programs(0) - 1:
        for first in range(i + 1, max_num_reqs + 1, BLOCK_SIZE):
            req = first + tl.arange(0, BLOCK_SIZE)
            tl.store(query_start_loc + req, num_reqs, mask=req <= max_num_reqs)
        return
    state = tl.load(idx_mapping + i)
    token = tl.where(state >= 0, tl.load(tokens + i), 0)
    step = tl.load(draft_step)
    tl.store(draft_tokens + i * draft_tokens_stride + step, token)
    position = tl.load(last_positions + i) + 1
    within = tl.minimum(position, last_position)
    tl.store(input_ids + i, token.to(tl.int32))
    tl.store(positions + i, within)
    tl.store(seq_lens + i, tl.where(i < num_reqs, within + 1, 0).to(tl.int32))
    tl.store(idx_mapping + i, tl.where(position > last_position, -1, state))
    tl.store(query_start_loc + i + 1, tl.minimum(i + 1, num_reqs).to(tl.int32))


def set_one_hot_draft_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    idx_mapping: torch.Tensor,
    drafts: torch.Tensor,
    depth: int,
) -> None:
    """Say to the rejection sampler that the first drafts of these rows are certain, or
    it takes them for samples of the drafter's distribution. Arguments as below."""
    grid = (len(rows), depth, triton.cdiv(logits.shape[2], _VOCAB_BLOCK))
    one_hot_draft_logits_kernel[grid](
        rows,
        idx_mapping,
        drafts,
        drafts.stride(0),
        logits,
        logits.stride(0),
        logits.stride(1),
        logits.shape[2],
        BLOCK_SIZE=_VOCAB_BLOCK,
    )


@triton.jit
def one_hot_draft_logits_kernel(
    rows,  # [num_rows] int64: of the drafts
    idx_mapping,  # [num_reqs] int64: request states
    drafts,  # [num_reqs, K] int64
    drafts_stride,
    logits,  # [max_num_reqs, K, vocab_size], by request state
    logits_stride,
    logits_stride_of_step,
    vocab_size,
    BLOCK_SIZE: tl.constexpr,
):
    """A program a row, draft and block of the vocabulary: the draft is certain."""
    row = tl.load(rows + tl.program_id(0))
    step = tl.program_id(1)
    draft = tl.load(drafts + row * drafts_stride + step)
    tokens = tl.program_id(2) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    values = tl.where(tokens == draft, 0.0, float("-inf"))
    state = tl.load(idx_mapping + row)
    to = logits + state * logits_stride + step * logits_stride_of_step
    tl.store(to + tokens, values, mask=tokens < vocab_size)
