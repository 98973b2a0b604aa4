"""Greedy tokens: of drafts, and on a CPU of what verifies them.

Stock's rejection sampler copies the drafts' rows out of the logits, makes them float32,
copies them once more for logits processors, and takes an argmax that on a CPU is twice
as slow as vLLM's own kernel for it. Where nothing changes the logits, the tokens are
the same without all that.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row, the first of equals. [num_rows] int64"""
    if logits.device.type == "cpu":  # its kernel takes float32 only
        logits = logits.to(torch.float32)
    return Sampler.greedy_sample(logits)


def argmax_with_confidence(
    logits: torch.Tensor, returns_confidence: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Greedy tokens; and, if asked for, how sure a drafter is of each: its probability,
    0 in a row with NaN or infinite logits. Then `logits` may be overwritten, as nothing
    of their size is to be allocated twice. [num_rows] int64 and float32"""
    if not returns_confidence:
        return greedy_tokens(logits), None
    logits = logits.to(torch.float32)
    tokens = greedy_tokens(logits)
    torch.softmax(logits, dim=-1, out=logits)
    confidence = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens, confidence.nan_to_num(nan=0.0)


def is_all_greedy(metadata: SamplingMetadata) -> bool:
    """Whether the logits' likeliest tokens are all that is asked for."""
    holder = metadata.thinking_budget_state_holder
    return (
        metadata.all_greedy
        and metadata.no_penalties
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and not metadata.bad_words_token_ids
        and metadata.allowed_token_ids_mask is None
        and (holder is None or not holder.has_tracked_requests())
        and all(map(_changes_nothing, metadata.logitsprocs.non_argmax_invariant))
    )


def _changes_nothing(processor: LogitsProcessor) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    return isinstance(processor, LogitBiasLogitsProcessor) and not processor.biases


def verify_greedily(
    metadata: SpecDecodeMetadata, logits: torch.Tensor
) -> SamplerOutput:
    """As vLLM's rejection sampler, where `is_all_greedy`.

    `logits`: [num_rows, vocab_size] of any dtype, on the CPU.
    """
    emitted = emitted_tokens(
        np.array(metadata.num_draft_tokens),
        metadata.draft_token_ids.numpy(),
        greedy_tokens(logits).numpy(),
        metadata.target_logits_indices.numpy(),
        metadata.bonus_logits_indices.numpy(),
    )
    return SamplerOutput(torch.from_numpy(emitted), logprobs_tensors=None)


def emitted_tokens(
    num_drafts: np.ndarray,
    drafts: np.ndarray,
    targets: np.ndarray,
    target_rows: np.ndarray,
    bonus_rows: np.ndarray,
) -> np.ndarray:
    """The target's tokens up to and with the first that is not the draft.

    Args:
        num_drafts: [num_reqs] integers, at least one of them above 0.
        drafts: [num_drafts.sum()] token ids.
        targets: [num_rows] token ids.
        target_rows: [num_drafts.sum()] row that judges each draft.
        bonus_rows: [num_reqs] row behind each request's last draft.

    Returns: [num_reqs, most drafts + 1] int32, filled up with placeholders.
    """
    position = np.arange(num_drafts.max() + 1)
    is_draft = position < num_drafts[:, None]
    emitted = np.full(is_draft.shape, PLACEHOLDER_TOKEN_ID, dtype=np.int32)
    emitted[is_draft] = targets[target_rows]
    emitted[position == num_drafts[:, None]] = targets[bonus_rows]
    ends = ~is_draft
    ends[is_draft] = emitted[is_draft] != drafts
    emitted[position > ends.argmax(axis=1)[:, None]] = PLACEHOLDER_TOKEN_ID
    return emitted
