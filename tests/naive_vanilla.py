"""EMS-SD's vanilla as a plain transformers program: padded inputs, padded masked K/V.

Greedy, float32, LLMA drafts. It exists to be counted: what its cache really holds and
its forwards really compute must be what the replay says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, LlamaForCausalLM

from tests.oracle import copied

PAD = 0


def drafts_of(tokens: Sequence[int], max_drafts: int) -> list[int]:
    """LLMA with a check length of one: a tiny vocabulary repeats itself."""
    return copied(tokens, 1, max_drafts, 32, 32)[0]


def accepted_of(drafts: Sequence[int], wanted: Sequence[int]) -> int:
    count = 0
    while count < len(drafts) and drafts[count] == wanted[count]:
        count += 1
    return count


@dataclass
class NaiveVanilla:
    """Decodes one batch; the counts are read off its tensors, step by step."""

    model: LlamaForCausalLM
    max_drafts: int
    num_rows: int = 0
    num_kv_slots: int = 0
    accepted: list[list[tuple[int, int]]] = field(default_factory=list)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        self._cache = DynamicCache()
        self._known = [list(prompt) for prompt in prompts]
        self._ends = [len(prompt) + max_tokens for prompt in prompts]
        self.accepted = [[] for _ in prompts]
        padded = [[PAD] * (longest - len(p)) + p for p in prompts]
        self._mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        )
        first = self._forward(padded, longest)
        for known, logits in zip(self._known, first, strict=True):
            known.append(int(logits[-1]))
        running = list(range(len(prompts)))
        while running := self._unfinished(running):
            self._step(running)
        return [
            known[len(prompt) : len(prompt) + max_tokens]
            for known, prompt in zip(self._known, prompts, strict=True)
        ]

    def _unfinished(self, running: list[int]) -> list[int]:
        """Those left; the others leave the cache and the mask."""
        kept = [
            row for row, i in enumerate(running) if len(self._known[i]) < self._ends[i]
        ]
        if len(kept) < len(running):
            self._cache.batch_select_indices(torch.tensor(kept, dtype=torch.long))
            self._mask = self._mask[kept]
        return [running[row] for row in kept]

    def _step(self, running: list[int]) -> None:
        drafts = [drafts_of(self._known[i], self.max_drafts) for i in running]
        num_rows = 1 + max(map(len, drafts))
        inputs = [
            ([self._known[i][-1], *made] + [PAD] * num_rows)[:num_rows]
            for i, made in zip(running, drafts, strict=True)
        ]
        aligned_len = self._mask.shape[1]
        self._mask = torch.cat(
            [self._mask, torch.ones(len(running), num_rows, dtype=torch.long)], dim=1
        )
        wanted = self._forward(inputs, num_rows)
        self._count(len(running), num_rows)
        most = 0
        for row, i in enumerate(running):
            count = accepted_of(drafts[row], wanted[row].tolist())
            self._known[i] += wanted[row][: count + 1].tolist()
            self._mask[row, aligned_len + 1 + count :] = 0  # rejected, or filler
            self.accepted[i].append((len(drafts[row]), count))
            most = max(most, count)
        self._mask = self._mask[:, : aligned_len + 1 + most]
        self._cache.crop(aligned_len + 1 + most)

    def _forward(self, inputs: list[list[int]], num_rows: int) -> torch.Tensor:
        """Greedy next tokens. Returns [num_reqs, num_rows]."""
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -num_rows:]
        return self.model(
            input_ids=torch.tensor(inputs),
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).logits.argmax(dim=-1)

    def _count(self, num_reqs: int, num_rows: int) -> None:
        kv_len = self._cache.layers[0].keys.shape[2]
        self.num_rows += num_reqs * num_rows
        self.num_kv_slots += num_reqs * kv_len
