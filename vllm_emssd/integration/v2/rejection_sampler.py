"""vLLM's V2 rejection sampler, exact for seeds and `logprob_token_ids`.

The V2 runner draws its noise from a request's seed and a token's position. Stock's
rejection sampling uses it in another way than plain sampling does, so that seeded
output depends on what was drafted; and it has no logprobs of named tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    _flatten_sampled_kernel,
)


class UnpadRejectionSamplerV2(RejectionSampler):
    # Of logprobs: how many of the likeliest tokens, how many named ones.
    _dims: tuple[int, int] | None = None

    def __call__(
        self, logits: torch.Tensor, input_batch: InputBatch, *args: Any, **kwargs: Any
    ) -> SamplerOutput:
        self._dims = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        return super().__call__(logits, input_batch, *args, **kwargs)

    def _get_logprobs_tensors(self, *args: Any) -> LogprobsTensors | None:
        """Of named tokens too, as the plain sampler reports them, of every row."""
        if self._dims is None or not self._dims[1]:
            return super()._get_logprobs_tensors(*args)
        sampled, num_sampled, logits, cu_num_logits, cu_num_logits_np, _ = args
        num_logprobs, max_token_ids = self._dims
        flat_sampled = sampled.new_zeros(len(logits))
        _flatten_sampled_kernel[(len(sampled),)](
            flat_sampled,
            sampled,
            sampled.stride(0),
            num_sampled,
            cu_num_logits,
            num_warps=1,
        )
        return compute_topk_scores(
            logits,
            num_logprobs,
            flat_sampled,
            # Where drafts are trimmed, the device alone knows.
            cu_num_logits.clone()
            if self.enable_adaptive_verification
            else cu_num_logits_np.tolist(),
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=self._expanded_idx_mapping,
            max_per_req_token_ids=max_token_ids,
            logits_mode=self.sampler.logprobs_mode
            in ("raw_logits", "processed_logits"),
        )

    def _verify(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Requests with a seed sample each row as plain decoding does, and keep the
        drafts that are what was sampled."""
        processed, sampled, num_sampled = super()._verify(*args)
        _, _, _, pos, cu_num_logits, _, slots, expanded_idx_mapping, *_, drafted = args
        self._expanded_idx_mapping = expanded_idx_mapping  # of these requests
        states = self.sampler.sampling_states
        is_seeded_np = states.seeds_set[slots]
        if not is_seeded_np.any() or self.synthetic_conditional_rates is not None:
            return processed, sampled, num_sampled
        plain = gumbel_sample(
            processed,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        columns = torch.arange(sampled.shape[1], device=sampled.device)
        rows = cu_num_logits[:-1, None] + columns  # [num_reqs, K + 1]
        is_draft = rows + 1 < cu_num_logits[1:, None]  # another row follows
        last = len(plain) - 1
        tokens = plain[rows.clamp(max=last)]
        drafts = drafted[(rows + 1).clamp(max=last)]
        is_kept = (is_draft & (tokens == drafts)).long().cumprod(dim=1)
        num_plain = is_kept.sum(dim=1) + 1
        is_seeded = async_tensor_h2d(is_seeded_np, device=sampled.device)
        return (
            processed,
            torch.where(is_seeded[:, None], tokens.to(sampled.dtype), sampled),
            torch.where(is_seeded, num_plain.to(num_sampled.dtype), num_sampled),
        )
