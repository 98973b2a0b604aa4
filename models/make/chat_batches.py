"""Chats that a target wrote, as batches to train and measure on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.make.distillation import Batch

MAX_TOKENS = 512  # of a chat
PROMPT_SHARE = 0.25  # of a prompt's positions that are trained on

Chat = dict[str, Any]


def read_chats(path: Path) -> list[Chat]:
    chats = [json.loads(line) for line in path.read_text().splitlines()]
    return [chat for chat in chats if chat["num_prompt_tokens"] < MAX_TOKENS]


def make_batch(chats: list[Chat], prompt_share: float = 0.0) -> Batch:
    """Padded on the right, where causal attention never looks.

    What counts are the positions that predict an answer's tokens, and at random some
    of those that predict a prompt's.
    """
    rows = [torch.tensor(chat["token_ids"][:MAX_TOKENS]) for chat in chats]
    token_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    counts = torch.rand(token_ids.shape) < prompt_share
    for i, (chat, row) in enumerate(zip(chats, rows, strict=True)):
        counts[i, chat["num_prompt_tokens"] - 1 : len(row) - 1] = True
        counts[i, len(row) - 1 :] = False
    return token_ids, counts


def in_order(chats: list[Chat], size: int, prompt_share: float = 0.0) -> list[Batch]:
    """Each chat once."""
    starts = range(0, len(chats), size)
    return [make_batch(chats[i : i + size], prompt_share) for i in starts]
