"""Train an EAGLE-3 head for a Llama.

    python -m models.make.train_eagle3 --target models/target --out models/eagle3

    python -m models.make.write_chats --target MODEL --out chats.jsonl
    python -m models.make.write_chats --target MODEL --out held-out.jsonl \\
        --num-chats 96 --held-out
    python -m models.make.train_eagle3 --target MODEL --chats chats.jsonl \\
        --held-out held-out.jsonl --aux-layers 2 15 27 --draft-vocab 8192 \\
        --out models/smollm2-eagle3

Text of the machine is trained on too (`documents.py`), and alone without chats. The
head is trained as it will draft: some rows on its own hidden states follow each that
has the target's, and the loss is KL(target || head) of all of them, the first most.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.make import train_pair
from models.make.chat_batches import PROMPT_SHARE, Chat, in_order, read_chats
from models.make.distillation import Batch, Loss, train
from models.make.documents import collect_documents
from models.make.eagle3_head import Eagle3Head, KeysValues

DECAY = 0.8  # weight of each row on own hidden states against the one before
LENGTH = 256  # tokens of a window of text
NUM_MEASURED = 8  # steps of windows


class Unrolled:
    """Drafts of the head, several after each position of the text.

    Args:
        depth: drafts after each position.
    """

    def __init__(self, head: Eagle3Head, target: LlamaForCausalLM, depth: int) -> None:
        self._head, self._target, self.depth = head, target, depth
        self._aux: dict[int, torch.Tensor] = {}
        # By the id of a batch's tokens: batches are kept for the whole training.
        self._computed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for number in head.aux_layers:
            target.model.layers[number - 1].register_forward_hook(
                lambda _, __, output, number=number: self._aux.update({number: output})
            )
        self._wanted_weight = target.get_output_embeddings().weight
        if head.draft_tokens is not None:
            self._wanted_weight = self._wanted_weight[head.draft_tokens]

    @torch.no_grad()
    def _target_states(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Its last hidden states and those for the head, computed once for a batch."""
        if id(token_ids) not in self._computed:
            hidden = self._target.model(input_ids=token_ids).last_hidden_state
            aux = torch.cat([self._aux[n] for n in self._head.aux_layers], dim=-1)
            self._computed[id(token_ids)] = hidden, aux
        return self._computed[id(token_ids)]

    def drafts(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each depth and the positions that count: the target's last hidden states,
        [num_positions, hidden_size], and the head's logits, [num_positions, draft
        vocabulary] float32."""
        token_ids, counts = batch
        hidden, aux = self._target_states(token_ids)
        with torch.no_grad():
            embeddings = self._target.model.embed_tokens(token_ids).float()
        own = self._head.model.fc(aux[:, :-1].float())
        num_rows, seen = own.shape[1], list[KeysValues]()
        for depth in range(self.depth):
            # Row p has the token at p + 1 + depth, after which it drafts.
            shifted = functional.pad(embeddings[:, 1 + depth :], (0, 0, 0, depth))
            positions = torch.arange(num_rows)[None] + depth
            own = self._head(shifted, own, positions, seen)
            counted = counts[:, 1 + depth :]
            drafted = own[:, : num_rows - depth][counted]
            yield hidden[:, 1 + depth :][counted], self._head.logits(drafted).float()

    def loss(self, batch: Batch) -> torch.Tensor:
        total, weight = torch.zeros(()), 1.0
        for hidden, drafted in self.drafts(batch):
            with torch.no_grad():
                wanted = functional.linear(hidden, self._wanted_weight).float()
            entropy = functional.cross_entropy(drafted, wanted.softmax(-1))
            total, weight = total + weight * entropy, weight * DECAY
        return total

    @torch.no_grad()
    def agreement(self, batches: Iterable[Batch]) -> list[float]:
        """How often each draft is the target's greedy token, after the text's."""
        found: list[list[torch.Tensor]] = [[] for _ in range(self.depth)]
        for batch in batches:
            for same, (hidden, drafted) in zip(found, self.drafts(batch), strict=True):
                wanted = self._target.lm_head(hidden)
                tokens = drafted.argmax(-1)
                if self._head.draft_tokens is not None:
                    tokens = self._head.draft_tokens[tokens]
                same.append(tokens == wanted.argmax(-1))
        return [torch.cat(same).float().mean().item() for same in found]


def most_frequent(chats: list[Chat], number: int) -> torch.Tensor:
    """Ids of the tokens that the answers use most, rising."""
    counts: Counter[int] = Counter()
    for chat in chats:
        counts.update(chat["token_ids"][chat["num_prompt_tokens"] :])
        counts.update(set(chat["token_ids"]))
    ids = [token for token, _ in counts.most_common(number)]
    unseen = (i for i in range(number * 2) if i not in counts)  # the commonest of BPE
    ids += islice(unseen, number - len(ids))
    return torch.tensor(sorted(ids))


def windows(data: np.ndarray, seed: int, number: int, size: int) -> list[Batch]:
    """Batches of windows of text, of which all positions count."""
    starts = np.random.default_rng(seed).integers(
        0, len(data) - LENGTH, (number, size, 1)
    )
    pieces = torch.from_numpy(data[starts + np.arange(LENGTH)])
    return [(piece, torch.ones_like(piece, dtype=torch.bool)) for piece in pieces]


def in_random_order(batches: list[Batch]) -> Iterator[Batch]:
    """Without end."""
    while True:
        for i in torch.randperm(len(batches)).tolist():
            yield batches[i]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--target", required=True)
    add("--out", type=Path, required=True)
    add("--chats", type=Path, help="that the target wrote")
    add("--held-out", type=Path, help="chats to measure on")
    add("--aux-layers", type=int, nargs="+", default=[1, 3, 5])
    add("--intermediate-size", type=int, default=1024)
    add("--draft-vocab", type=int, help="its most frequent tokens; else all")
    add("--depth", type=int, default=3, help="drafts after each position")
    add("--steps", type=int, default=600)
    add("--num-windows", type=int, default=600, help="batches of text of the machine")
    add("--batch-size", type=int, default=8, help="chats or windows of a step")
    add("--go-on", action="store_true", help="from the weights in --out")
    add("--lr-scale", type=float, default=0.5, help="of the learning rates")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(1)
    target = LlamaForCausalLM.from_pretrained(arguments.target, dtype=torch.bfloat16)
    target.requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.target)
    documents = collect_documents(1)
    text, held_out_text = (
        train_pair.encode(
            tokenizer, [d for d in documents if d.is_held_out == is_held_out]
        )
        for is_held_out in (False, True)
    )
    draft_tokens, size = None, arguments.batch_size
    batches = windows(text, 1, arguments.num_windows, size)
    measured = windows(held_out_text, 0, NUM_MEASURED, size)
    if arguments.chats:
        chats = read_chats(arguments.chats)
        if arguments.draft_vocab:
            draft_tokens = most_frequent(chats, arguments.draft_vocab)
        chats.sort(key=lambda chat: len(chat["token_ids"]))
        batches += in_order(chats, size, PROMPT_SHARE)
        measured = in_order(read_chats(arguments.held_out), size)
    head = Eagle3Head(
        target, arguments.aux_layers, arguments.intermediate_size, draft_tokens
    )
    if arguments.go_on:
        head.load(arguments.out)
    unrolled = Unrolled(head, target, arguments.depth)
    loss: Loss = unrolled.loss
    train(head, loss, in_random_order(batches), arguments.steps, arguments.lr_scale)
    record = {
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "num_parameters": sum(p.numel() for p in head.parameters() if p.requires_grad),
        "greedy_agreement_by_depth": unrolled.agreement(measured),
    }
    head.save(arguments.out, arguments.target, torch.bfloat16)
    path = arguments.out / "training.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
