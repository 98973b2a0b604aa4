"""Tokens that the V2 runner's rejection sampler emits for made-up logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

NUM_REQS = 600  # of each kind
K = 2
VOCAB = 6
TEMPERATURE = 0.8
# Drafts are samples, or one-hot as copies are, or those of a request with a seed.
KINDS = ("sampled", "copied", "seeded")


def markov_logits(seed: int) -> torch.Tensor:
    """Of the next token, by the last one. [VOCAB, VOCAB]"""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


TARGET, DRAFTER = markov_logits(1), markov_logits(2)


def make_sampler(kinds: np.ndarray, rng: np.random.Generator) -> Any:
    """With the noise and the temperature of each request, and no other parameters."""
    from vllm_emssd.integration.v2.rejection_sampler import UnpadRejectionSamplerV2

    seeds = rng.integers(0, 2**62, len(kinds))
    states = SimpleNamespace(
        temperature=SimpleNamespace(gpu=torch.full((len(kinds),), TEMPERATURE)),
        seeds=SimpleNamespace(gpu=torch.from_numpy(seeds)),
        seeds_set=kinds == "seeded",
    )
    stock = SimpleNamespace(
        sampling_states=states,
        use_fp64_gumbel=False,
        apply_sampling_params=lambda logits, *args: logits / TEMPERATURE,
    )
    config: Any = SimpleNamespace(
        num_speculative_tokens=K,
        enable_adaptive_verification=False,
        rejection_sample_method="standard",
    )
    return UnpadRejectionSamplerV2(stock, config, torch.device("cpu"))


def emitted(
    kinds: np.ndarray, are_copies_certain: bool = True, seed: int = 0
) -> list[list[int]]:
    """Tokens of each request after token 0, by its kind: as many as are emitted in one
    step. Requests of a kind differ in their noise, and copies in what is copied."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    from vllm_emssd.integration.v2.kernels import set_one_hot_draft_logits

    rng, num_reqs = np.random.default_rng(seed), len(kinds)
    sampler = make_sampler(kinds, rng)
    states = sampler.sampler.sampling_states
    slots, position = torch.arange(num_reqs), torch.full((num_reqs,), 40)
    draft_logits = torch.zeros(num_reqs, K, VOCAB)
    tokens = torch.zeros(num_reqs, K + 1, dtype=torch.int64)
    for step in range(K):
        tokens[:, step + 1] = gumbel_sample(
            DRAFTER[tokens[:, step]],
            slots,
            states.temperature.gpu,
            states.seeds.gpu,
            position + step,
            apply_temperature=True,
            is_drafting=True,
            logits_cache=draft_logits,
            logits_cache_col=torch.tensor(step),
        )
    copies = torch.from_numpy(np.flatnonzero(kinds == "copied"))
    tokens[copies, 1:] = torch.from_numpy(rng.integers(0, VOCAB, (len(copies), K)))
    if are_copies_certain:
        set_one_hot_draft_logits(draft_logits, copies, slots, tokens[:, 1:], K)
    rows = tokens.flatten()
    _, sampled, num_sampled = sampler._verify(
        TARGET[rows],
        draft_logits,
        rows,
        (position[:, None] + torch.arange(K + 1)).flatten(),
        torch.arange(num_reqs + 1, dtype=torch.int32) * (K + 1),
        slots,
        slots.numpy(),
        slots.repeat_interleave(K + 1),
        torch.arange(K + 1, dtype=torch.int32).repeat(num_reqs),
        np.full(num_reqs, 64),
        rows,
    )
    return [s[:n] for s, n in zip(sampled.tolist(), num_sampled.tolist(), strict=True)]


def run_all() -> dict[str, Any]:
    together = np.tile(KINDS, NUM_REQS)
    tokens = emitted(together)
    seen = {kind: tokens[i :: len(KINDS)] for i, kind in enumerate(KINDS)}
    alone = np.repeat("copied", NUM_REQS)
    return seen | {"uncertain copies": emitted(alone, are_copies_certain=False, seed=1)}
