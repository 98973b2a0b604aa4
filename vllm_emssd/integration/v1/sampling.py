"""Sampling with ragged drafts on vLLM's V1 runner.

The part of our runner between the target's forward and the drafts of the next step:
which rows are compared, which logits processors apply to them, what draft distributions
are known, and generators that must not advance.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    AdapterLogitsProcessor,
    LogitsProcessors,
)
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_emssd.config import EmssdConfig
from vllm_emssd.integration.hooks.hook import Hook
from vllm_emssd.integration.v1.drafter import PagedDrafter
from vllm_emssd.integration.v1.greedy import is_all_greedy, verify_greedily

logger = init_logger("vllm.emssd.sampling")


def _make_logitsprocs_hook(
    stock: Callable[..., LogitsProcessors],
) -> Callable[..., LogitsProcessors]:
    def build_logitsprocs(
        vllm_config: VllmConfig, *args: Any, **kwargs: Any
    ) -> LogitsProcessors:
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        return stock(plain, *args, **kwargs)

    return build_logitsprocs


LOGITSPROCS_HOOK = Hook(
    target="vllm.v1.worker.gpu_model_runner:build_logitsprocs",
    why="with speculation, stock leaves out min_p, logit_bias and custom processors",
    signature=(
        "vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs"
    ),
    remove_when="stock builds all processors with speculation on",
    make=_make_logitsprocs_hook,
    when="while an emssd worker makes its runner",
)


def count_nan_as_one_hot(probs: torch.Tensor, draft_token_ids: torch.Tensor) -> None:
    """Where the drafter computed NaN, make the distribution one-hot, in place.

    That is exact for any token. The NaN would else reach what the target samples after
    a rejection. A softmax is NaN everywhere or nowhere. Shapes:
    [num_draft_tokens, vocab_size] float32, [num_draft_tokens] integers.
    """
    is_nan = probs[:, :1].isnan()
    probs.masked_fill_(is_nan, 0.0)
    probs.scatter_add_(1, draft_token_ids.long().unsqueeze(1), is_nan.to(probs.dtype))


class UnpadSamplingMixin(GPUModelRunner):
    emssd_config: EmssdConfig
    paged_drafter: PagedDrafter | None
    num_real_drafts: dict[str, int]  # of each request's drafts, filler not counted

    def _sample(
        self, logits: torch.Tensor, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        sampling_metadata = self.input_batch.sampling_metadata
        drafts = spec_decode_metadata
        if drafts is not None and not self.emssd_config.unpad_inputs:
            drafts = self._without_filler(drafts)
        if drafts is not None and not any(drafts.num_draft_tokens):
            # Plain sampling costs less; stock's rejection sampler also fails
            # on top_k or top_p without any drafted row (CPU).
            if len(logits) > self.input_batch.num_reqs:
                logits = logits[drafts.bonus_logits_indices]
            drafts = None
        with self._discarded_generators_hidden():
            if (
                drafts is not None
                and self.device.type == "cpu"
                and not self.rejection_sampler.synthetic_mode
                and is_all_greedy(self.input_batch.sampling_metadata)
            ):
                output = verify_greedily(drafts, logits)
            else:
                output = super()._sample(logits, drafts)
        self.input_batch.sampling_metadata = sampling_metadata
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        # Stock would move those generators back by their offset, which CPU ones lack.
        with self._discarded_generators_hidden():
            return super()._bookkeeping_sync(*args, **kwargs)

    @contextmanager
    def _discarded_generators_hidden(self) -> Iterator[None]:
        """Nothing advances a request's generator until its prompt is computed."""
        generators = self.input_batch.generators
        discarded = [i for i in generators if self.discard_request_mask.np[i]]
        hidden = {i: generators.pop(i) for i in discarded}
        try:
            yield
        finally:
            generators.update(hidden)

    def _without_filler(self, metadata: SpecDecodeMetadata) -> SpecDecodeMetadata:
        """The same metadata, comparing real drafts only. The sampling metadata lists
        drafts too, for penalties and bad words: it is replaced alike."""
        real = [self.num_real_drafts.get(r, 0) for r in self.input_batch.req_ids]
        scheduled = np.asarray(metadata.num_draft_tokens)
        num_real = np.minimum(scheduled, real)
        starts = np.repeat(scheduled.cumsum() - scheduled, scheduled)
        is_real = np.arange(len(starts)) - starts < np.repeat(num_real, scheduled)
        real_drafts = np.flatnonzero(is_real)  # a mask would make a GPU's host wait
        num_draft_tokens = num_real.tolist()
        sampling_metadata = self.input_batch.sampling_metadata
        if listed := sampling_metadata.spec_token_ids:
            each = zip(listed, num_draft_tokens, strict=False)
            self.input_batch.sampling_metadata = dataclasses.replace(
                sampling_metadata, spec_token_ids=[t[:n] for t, n in each]
            )
        kept, ends, num_filler = (
            torch.from_numpy(values).to(metadata.draft_token_ids.device)
            for values in (
                real_drafts,
                num_real.cumsum(dtype=np.int32),
                scheduled - num_real,
            )
        )
        return dataclasses.replace(
            metadata,
            draft_token_ids=metadata.draft_token_ids[kept],
            num_draft_tokens=num_draft_tokens,
            cu_num_draft_tokens=ends,
            target_logits_indices=metadata.target_logits_indices[kept],
            # The row behind the last real draft, which filler follows.
            bonus_logits_indices=metadata.bonus_logits_indices - num_filler,
        )

    def _get_spec_decode_draft_probs(
        self, spec_decode_metadata: SpecDecodeMetadata
    ) -> torch.Tensor | None:
        """Distributions of all drafts, [num_draft_tokens, vocab_size] float32, or None
        where all are one-hot. Stock drops all of them when one request has none."""
        if self.paged_drafter is None or not self.paged_drafter.draft_probs:
            return None
        if self.input_batch.sampling_metadata.all_greedy:
            return None
        draft_token_ids = spec_decode_metadata.draft_token_ids
        probs = torch.zeros(
            (len(draft_token_ids), self.input_batch.vocab_size),
            dtype=torch.float32,
            device=draft_token_ids.device,
        )
        first = 0
        for req_id, num_drafts in zip(
            self.input_batch.req_ids, spec_decode_metadata.num_draft_tokens, strict=True
        ):
            rows = slice(first, first + num_drafts)
            kept = self.paged_drafter.draft_probs.get(req_id)
            if kept:
                for row, distribution in zip(probs[rows], kept, strict=False):
                    row.copy_(distribution)
            else:
                probs[rows].scatter_(1, draft_token_ids[rows].long().unsqueeze(1), 1.0)
            first += num_drafts
        count_nan_as_one_hot(probs, draft_token_ids)
        return probs

    def _requests_of_custom_logitsprocs(self) -> list[int]:
        """Batch rows whose logits a user's processor may change. It sees one row a
        request, so they cannot be verified several rows at a time: they get no drafts.
        """
        rows: set[int] = set()
        for processor in self.input_batch.logitsprocs.all:
            if isinstance(processor, tuple(BUILTIN_LOGITS_PROCESSORS)):
                continue
            if not isinstance(processor, AdapterLogitsProcessor):
                logger.warning_once(
                    "No request gets drafts: %s may change the logits of any of them. "
                    "Derive it from AdapterLogitsProcessor, which names the requests "
                    "it applies to, and only those get none.",
                    type(processor).__name__,
                )
                return list(range(self.input_batch.num_reqs))
            rows.update(processor.req_info)
        return sorted(rows)
