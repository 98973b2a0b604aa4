"""vLLM's rejection sampler with the parameters that it leaves out.

Stock applies `logit_bias` and `min_p` to rows without drafts only, and therefore
refuses both once speculation is on. Here they apply to every verified row, in the
order of vLLM's plain sampler. What a vLLM applies itself is left to it.
"""

from __future__ import annotations

import torch
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_emssd.integration.compat import applies_with_drafts


class UnpadRejectionSampler(RejectionSampler):
    def apply_logits_processors(
        self,
        logits: torch.Tensor,  # [num_draft_tokens, vocab_size] float32
        sampling_metadata: SamplingMetadata,
        metadata: SpecDecodeMetadata,
    ) -> torch.Tensor:
        processors = sampling_metadata.logitsprocs
        if not applies_with_drafts(LogitBiasLogitsProcessor):
            add_logit_bias(logits, processors, metadata.num_draft_tokens)
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        if not (
            sampling_metadata.all_greedy or applies_with_drafts(MinPLogitsProcessor)
        ):
            mask_below_min_p(
                logits,
                processors,
                sampling_metadata.temperature,
                metadata.num_draft_tokens,
            )
        return logits


def add_logit_bias(
    logits: torch.Tensor, processors: LogitsProcessors, num_draft_tokens: list[int]
) -> None:
    """Add each request's `logit_bias` to its drafted rows, in place.

    `logits`: [sum(num_draft_tokens), vocab_size] float32.
    """
    for processor in processors.non_argmax_invariant:
        if not isinstance(processor, LogitBiasLogitsProcessor):
            continue
        for req_index, bias in processor.biases.items():
            first = sum(num_draft_tokens[:req_index])
            rows = logits[first : first + num_draft_tokens[req_index]]
            token_ids = torch.tensor(list(bias), device=logits.device)
            rows[:, token_ids] += torch.tensor(
                list(bias.values()), dtype=logits.dtype, device=logits.device
            )


def mask_below_min_p(
    logits: torch.Tensor,
    processors: LogitsProcessors,
    temperature: torch.Tensor,
    num_draft_tokens: list[int],
) -> None:
    """Mask tokens less likely than `min_p` times the likeliest, in place.

    Done before the temperature is applied, hence on logits: p < min_p * p_max at
    temperature T means logit < logit_max + T * log(min_p). Shapes: `logits`
    [sum(num_draft_tokens), vocab_size] float32, `temperature` [num_reqs] float32.
    """
    for processor in processors.argmax_invariant:
        if not isinstance(processor, MinPLogitsProcessor) or not processor.min_p_count:
            continue
        counts = torch.tensor(num_draft_tokens, device=logits.device)
        below_max = temperature * torch.log(processor.min_p.flatten())
        allowed = torch.repeat_interleave(below_max, counts, output_size=len(logits))
        least = logits.amax(dim=-1) + allowed
        logits.masked_fill_(logits < least.unsqueeze(-1), float("-inf"))
