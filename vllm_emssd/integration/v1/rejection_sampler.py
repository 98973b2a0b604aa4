"""vLLM's samplers, exact for every parameter of a request that has drafts.

Stock applies `logit_bias` and `min_p` to rows without drafts only, and therefore
refuses both once speculation is on. Here they apply to every verified row, in the
order of vLLM's plain sampler. What a vLLM applies itself is left to it. The row behind
the drafts is sampled as the position it is, `logprob_token_ids` are reported for every
emitted token, and a request with a seed gets the very tokens it gets without drafts.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


class UnpadSampler(Sampler):
    """The plain sampler, which also samples the row behind each request's drafts."""

    # Of the step's rejection sampling:
    num_draft_tokens: list[int]
    bonus_generators: dict[int, torch.Generator]
    token_ids_of_rows: dict[int, list[int]] | None = None  # to report logprobs of

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        *args: object,
        **kwargs: object,
    ) -> SamplerOutput:
        if predict_bonus_token:
            sampling_metadata = dataclasses.replace(
                sampling_metadata,
                generators=self.bonus_generators,
                logitsprocs=behind_drafts(
                    sampling_metadata.logitsprocs, self.num_draft_tokens
                ),
            )
        return super().forward(
            logits, sampling_metadata, predict_bonus_token, *args, **kwargs
        )

    def gather_logprobs(  # type: ignore[override]
        self, logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
    ) -> LogprobsTensors:
        if self.token_ids_of_rows is None:
            return super().gather_logprobs(logprobs, num_logprobs, token_ids)
        gathered = self.gather_specific_token_logprobs(
            logprobs, self.token_ids_of_rows, token_ids
        )
        assert gathered is not None
        return gathered


def behind_drafts(
    processors: LogitsProcessors, num_draft_tokens: list[int]
) -> LogitsProcessors:
    """The processors as they are for the row behind each request's drafts: of the
    built-in ones only `min_tokens` depends on how long the answer is there."""
    return LogitsProcessors(
        min_tokens_behind_drafts(processor, num_draft_tokens)
        if isinstance(processor, MinTokensLogitsProcessor) and processor.min_toks
        else processor
        for processor in processors.all
    )


def min_tokens_behind_drafts(
    processor: MinTokensLogitsProcessor, num_draft_tokens: list[int]
) -> MinTokensLogitsProcessor:
    """A copy for answers that are longer by their drafts. [num_reqs] drafts.

    Whether an answer is long enough is decided here: a vLLM that counts drafts itself
    must not count them twice.
    """
    ahead = copy.copy(processor)
    ahead.min_toks = {
        index: (
            0 if len(output) + num_draft_tokens[index] >= least else sys.maxsize,
            output,
            *rest,
        )
        for index, (least, output, *rest) in processor.min_toks.items()
    }
    ahead.update_state(None)  # drops those that have reached their minimum
    return ahead


@dataclass(slots=True)
class _SeededRows:
    """What requests with a seed sample in their drafts' rows."""

    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    # Requests with a draft that was not sampled, with their generator and its state.
    rejected: list[tuple[torch.Generator, torch.Tensor]] = field(default_factory=list)
    processed_logits: torch.Tensor | None = None  # [len(rows), vocab_size]


class UnpadRejectionSampler(RejectionSampler):
    sampler: UnpadSampler

    _seeded: _SeededRows | None = None
    _logprob_token_ids: dict[int, list[int]] | None = None

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        generators = sampling_metadata.generators
        self.sampler.num_draft_tokens = metadata.num_draft_tokens
        self.sampler.bonus_generators = generators
        self._logprob_token_ids = sampling_metadata.logprob_token_ids
        if self._logprob_token_ids:
            sampling_metadata = dataclasses.replace(
                sampling_metadata,
                logprob_token_ids=None,
                max_num_logprobs=sampling_metadata.max_num_logprobs or 0,
            )
        if not generators or self.synthetic_mode:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        self._seeded = self._sample_seeded(metadata, logits, sampling_metadata)
        if draft_probs is not None and self._seeded.rows:
            rows = torch.tensor(self._seeded.rows, device=draft_probs.device)
            draft_probs[rows] = 0.0
            draft_probs[rows, metadata.draft_token_ids[rows].long()] = 1.0
        try:
            return super().forward(
                metadata,
                draft_probs,
                logits,
                dataclasses.replace(sampling_metadata, generators={}),
            )
        finally:
            for generator, state in self._seeded.rejected:
                generator.set_state(state)  # its bonus token is not emitted
            self._seeded = None

    def _sample_seeded(
        self,
        metadata: SpecDecodeMetadata,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> _SeededRows:
        """Sample the rows of requests with a seed one after the other, as plain
        decoding does, up to the first whose draft is another token. The generator is
        advanced once for each. A draft is accepted by its probability, as in rejection
        sampling of a draft that was not sampled itself.
        """
        seeded = _SeededRows()
        num_draft_tokens = metadata.num_draft_tokens
        if not any(num_draft_tokens[i] for i in sampling_metadata.generators):
            return seeded
        target_logits = logits[metadata.target_logits_indices].to(torch.float32)
        holder = sampling_metadata.thinking_budget_state_holder
        if holder is not None and holder.has_tracked_requests():
            holder.update_state(
                sampling_metadata.output_token_ids, sampling_metadata.spec_token_ids
            )
        target_logits = self._process(target_logits, sampling_metadata, metadata)
        filters = sampling_metadata.top_k, sampling_metadata.top_p
        drafts = metadata.draft_token_ids.tolist()
        for index, generator in sampling_metadata.generators.items():
            num_rows, first = num_draft_tokens[index], sum(num_draft_tokens[:index])
            if num_rows == 0:
                continue
            own = slice(first, first + num_rows)
            target_logits[own] = apply_top_k_top_p(
                target_logits[own] / sampling_metadata.temperature[index],
                *(None if of is None else of[index].expand(num_rows) for of in filters),
            )
            for row in range(first, first + num_rows):
                sampled, _ = self.sampler.topk_topp_sampler(
                    target_logits[[row]], {0: generator}, None, None
                )
                seeded.rows.append(row)
                seeded.tokens.append(int(sampled))
                if seeded.tokens[-1] != drafts[row]:
                    seeded.rejected.append((generator, generator.get_state()))
                    break
        seeded.processed_logits = target_logits[seeded.rows]
        return seeded

    def apply_logits_processors(
        self,
        logits: torch.Tensor,  # [num_draft_tokens, vocab_size] float32
        sampling_metadata: SamplingMetadata,
        metadata: SpecDecodeMetadata,
    ) -> torch.Tensor:
        logits = self._process(logits, sampling_metadata, metadata)
        if self._seeded is not None and self._seeded.rows:
            # Nothing else can come out of these rows.
            logits[self._seeded.rows] = float("-inf")
            logits[self._seeded.rows, self._seeded.tokens] = 0.0
        return logits

    def _process(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        metadata: SpecDecodeMetadata,
    ) -> torch.Tensor:
        processors = sampling_metadata.logitsprocs
        add_logit_bias(logits, processors, metadata.num_draft_tokens)
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        if not sampling_metadata.all_greedy:
            mask_below_min_p(
                logits,
                processors,
                sampling_metadata.temperature,
                metadata.num_draft_tokens,
            )
        return logits

    def _get_logprobs_tensors(self, *args: Any) -> LogprobsTensors:
        _, _, _, target_logits, _, sampled_token_ids, *_ = args
        seeded = self._seeded
        if seeded is not None and seeded.rows and self.is_processed_logprobs_mode:
            assert seeded.processed_logits is not None
            target_logits[seeded.rows] = seeded.processed_logits
        width = sampled_token_ids.shape[-1]
        self.sampler.token_ids_of_rows = {
            row: token_ids
            for index, token_ids in (self._logprob_token_ids or {}).items()
            for row in range(index * width, (index + 1) * width)
        } or None
        try:
            return super()._get_logprobs_tensors(*args)
        finally:
            self.sampler.token_ids_of_rows = None


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
