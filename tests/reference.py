"""Speculative decoding as the papers write it: one request, no batching, no cache.

Every forward recomputes the whole sequence with transformers, so there is nothing
that could be stale. Slow and plain; the engine must agree with it, draft by draft.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True, slots=True)
class Reference:
    """Tokens of one request, and how many drafts each verification accepted."""

    token_ids: list[int]
    accepted: list[int]


class GreedySpeculativeDecoding:
    """Leviathan et al. (arXiv 2211.17192), greedy, in float32.

    Args:
        target, draft: folders of causal language models with one vocabulary.
        num_speculative_tokens: drafts a step.
    """

    def __init__(self, target: str, draft: str, num_speculative_tokens: int) -> None:
        self._target = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        self._draft = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
        self._num_drafts = num_speculative_tokens

    @torch.inference_mode()
    def generate(self, prompt_ids: list[int], max_tokens: int) -> Reference:
        """The first token comes from the prompt alone; drafts begin after it."""
        known = list(prompt_ids)
        known.append(self._next_tokens(self._target, known)[-1])
        accepted: list[int] = []
        while len(known) < len(prompt_ids) + max_tokens:
            drafts = self._drafts_after(known)
            wanted = self._next_tokens(self._target, known + drafts)[len(known) - 1 :]
            num_accepted = 0
            while num_accepted < len(drafts) and (
                drafts[num_accepted] == wanted[num_accepted]
            ):
                num_accepted += 1
            known += wanted[: num_accepted + 1]
            accepted.append(num_accepted)
        return Reference(known[len(prompt_ids) :][:max_tokens], accepted)

    def _drafts_after(self, known: list[int]) -> list[int]:
        drafts: list[int] = []
        for _ in range(self._num_drafts):
            drafts.append(self._next_tokens(self._draft, known + drafts)[-1])
        return drafts

    def _next_tokens(self, model: torch.nn.Module, token_ids: list[int]) -> list[int]:
        """Greedy next token after each position. Returns [len(token_ids)]."""
        logits = model(input_ids=torch.tensor([token_ids])).logits[0]
        return logits.argmax(dim=-1).tolist()
