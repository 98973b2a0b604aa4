"""Chats that a model wrote, with its final hidden states, as training reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

NUM_COMMON = 3072  # words of every loss
BUCKET = 32  # batches whose chats are sorted by length together


@dataclass(frozen=True, slots=True)
class Chat:
    tokens: torch.Tensor  # [n] int64
    hidden: torch.Tensor  # [n, hidden] bfloat16, the target's
    num_prompt_tokens: int


@dataclass(slots=True)
class Chats:
    """The chats of a folder, to which shards may be added."""

    folder: Path
    max_tokens: int = 512
    chats: list[Chat] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def load_new(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self.seen:
                self.seen.add(path.name)
                self.chats += self._read(path)

    def _read(self, path: Path) -> Iterator[Chat]:
        with safe_open(path, "pt") as shard:
            names = ("tokens", "hidden", "lengths", "prompt_lengths")
            tokens, hidden, lengths, prompts = (shard.get_tensor(n) for n in names)
        sizes = lengths.tolist()
        parts = zip(tokens.split(sizes), hidden.split(sizes), prompts, strict=True)
        for ids, states, num_prompt_tokens in parts:
            end = self.max_tokens
            if num_prompt_tokens < min(end, len(ids)):
                yield Chat(ids[:end].long(), states[:end].clone(), num_prompt_tokens)

    @property
    def num_tokens(self) -> int:
        return sum(len(chat.tokens) for chat in self.chats)

    def common_words(self, vocab_size: int) -> torch.Tensor:
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for chat in self.chats:
            counts += torch.bincount(chat.tokens, minlength=vocab_size)
        return counts.topk(NUM_COMMON).indices

    def batches(
        self, num_tokens: int, rng: np.random.Generator
    ) -> Iterator[list[Chat]]:
        """Of about as long chats, in random order, for ever."""
        while True:
            self.load_new()
            order = [self.chats[i] for i in rng.permutation(len(self.chats))]
            size = max(1, BUCKET * num_tokens * len(order) // self.num_tokens)
            for i in range(0, len(order), size):
                bucket = sorted(order[i : i + size], key=lambda chat: len(chat.tokens))
                made = list(cut(bucket, num_tokens))
                yield from (made[j] for j in rng.permutation(len(made)))


def cut(chats: list[Chat], num_tokens: int) -> Iterator[list[Chat]]:
    """Into batches of at most so many tokens, padding counted."""
    batch: list[Chat] = []
    for chat in chats:
        if batch and len(chat.tokens) * (len(batch) + 1) > num_tokens:
            yield batch
            batch = []
        batch.append(chat)
    yield batch


def pad(batch: list[Chat]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [b, n], the target's states [b, n, hidden], is it an answer's? [b, n].

    Causal attention never looks at the padding, which is on the right.
    """
    rows = [chat.tokens for chat in batch]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = nn.utils.rnn.pad_sequence([c.hidden for c in batch], batch_first=True)
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    for i, chat in enumerate(batch):  # the last token of the prompt predicts the first
        answer[i, chat.num_prompt_tokens - 1 : len(chat.tokens)] = True
    return tokens, hidden, answer
