"""The copy proposers' own time a step, which must not grow with the context."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_emssd.bench import corpus
from vllm_emssd.bench.methods import MethodOptions
from vllm_emssd.bench.request import Tokenizer
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.copier import Copier
from vllm_emssd.proposers.copy_lengths import CopyLengths
from vllm_emssd.proposers.llma import LlmaProposer

CONTEXTS = (512, 4_096, 32_768)  # tokens
WARM_UP_STEPS = 5
TOKENS_A_STEP = 4  # what a step adds to each request: 3 accepted drafts and one more

Propose = Callable[[np.ndarray, np.ndarray], Any]  # token_ids, num_tokens


@dataclass(frozen=True, slots=True)
class ProposerTime:
    proposer: str
    num_context_tokens: int
    num_reqs: int
    first_ms: float  # llma: takes in the prompts, once
    step_ms: float  # median
    step_ms_p99: float


def proposer_times(
    tokenizer: Tokenizer, num_reqs: int, num_steps: int, options: MethodOptions
) -> list[dict[str, Any]]:
    """llma and stock ngram, on the same held-out text, by context length."""
    text = _text(tokenizer, max(CONTEXTS) + num_reqs)
    return [
        asdict(
            _measure(name, make(num_reqs, options), text, context, num_reqs, num_steps)
        )
        for name, make in (("llma", _llma), ("ngram", _ngram))
        for context in CONTEXTS
    ]


def _text(tokenizer: Tokenizer, num_tokens: int) -> np.ndarray:
    """Held-out sources, one after the other, from the start again if need be."""
    found: list[int] = []
    while len(found) < num_tokens:
        for source in corpus.held_out_sources():
            found += tokenizer.encode(source.text)
            if len(found) >= num_tokens:
                break
    return np.array(found[:num_tokens], dtype=np.int32)


def _measure(
    name: str,
    propose: Propose,
    text: np.ndarray,
    context: int,
    num_reqs: int,
    num_steps: int,
) -> ProposerTime:
    """The last steps up to `context` tokens, each request at another place."""
    total_steps = num_steps + WARM_UP_STEPS
    token_ids = np.zeros((num_reqs, max(CONTEXTS)), dtype=np.int32)
    for i in range(num_reqs):
        token_ids[i, :context] = text[i : i + context]
    times = []
    for step in range(total_steps):
        known = context - TOKENS_A_STEP * (total_steps - 1 - step)
        start = time.perf_counter()
        propose(token_ids, np.full(num_reqs, known, dtype=np.int64))
        times.append((time.perf_counter() - start) * 1e3)
    steady = times[WARM_UP_STEPS:]
    return ProposerTime(
        name,
        context,
        num_reqs,
        times[0],
        median(steady),
        float(np.quantile(steady, 0.99)),
    )


def _llma(num_reqs: int, options: MethodOptions) -> Propose:
    proposer = LlmaProposer(
        Copier(options.check_length), options.copy_length, CopyLengths()
    )
    req_ids = [str(i) for i in range(num_reqs)]

    def propose(token_ids: np.ndarray, num_tokens: np.ndarray) -> list[list[int]]:
        same = np.full(num_reqs, TOKENS_A_STEP, dtype=np.int64)
        return proposer.propose(
            DraftBatch(
                req_ids=req_ids,
                token_ids=token_ids,
                num_tokens=num_tokens,
                num_prompt_tokens=same,
                num_scheduled_tokens=same,
                num_prefilled_tokens=num_tokens - 1,
                is_sampling=np.ones(num_reqs, dtype=bool),
                max_draft_tokens=np.full(num_reqs, options.copy_length, np.int64),
            )
        )

    return propose


def _ngram(num_reqs: int, options: MethodOptions) -> Propose:
    """vLLM's proposer reads these few settings alone."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    stock = NgramProposer(
        SimpleNamespace(  # type: ignore[arg-type]
            speculative_config=SimpleNamespace(
                prompt_lookup_min=options.check_length,
                prompt_lookup_max=options.check_length,
                num_speculative_tokens=options.copy_length,
            ),
            model_config=SimpleNamespace(max_model_len=max(CONTEXTS) + 1),
            scheduler_config=SimpleNamespace(max_num_seqs=num_reqs),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
    )
    sampled: Sequence[list[int]] = [[0]] * num_reqs

    def propose(token_ids: np.ndarray, num_tokens: np.ndarray) -> list[list[int]]:
        return stock.propose(options.copy_length, list(sampled), num_tokens, token_ids)

    return propose
