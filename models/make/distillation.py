"""Training steps, and what makes a draft model's tokens those of its target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from types import EllipsisType

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaForCausalLM, get_wsd_schedule

# Token ids [batch, length] int64, and the positions that count [batch, length] bool.
Batch = tuple[torch.Tensor, torch.Tensor | EllipsisType]
Loss = Callable[[Batch], torch.Tensor]


def train(
    model: LlamaForCausalLM,
    loss_of: Loss,
    batches: Iterable[Batch],
    num_steps: int,
    lr_scale: float = 1.0,
) -> float:
    """One step for each batch: Muon for the layers' matrices, AdamW for the rest.

    The learning rates warm up over the first 2 % of the steps and fall to zero over
    the last 40 %. Returns the last loss.
    """
    layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in layers}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    optimizers = [
        torch.optim.Muon(layers, lr=0.02 * lr_scale, weight_decay=0.01, ns_steps=4),
        torch.optim.AdamW(rest, lr=3e-3 * lr_scale, betas=(0.9, 0.95), weight_decay=0),
    ]
    warmup, decay = max(1, num_steps // 50), num_steps * 2 // 5
    schedules = [
        get_wsd_schedule(
            optimizer, warmup, decay, num_training_steps=num_steps, decay_type="linear"
        )
        for optimizer in optimizers
    ]
    bar = tqdm(islice(batches, num_steps), total=num_steps, mininterval=1)
    for batch in bar:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepping in (*optimizers, *schedules):
            stepping.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return loss.item()


def logits_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """[num_positions, vocab_size] float32, of the positions that count."""
    token_ids, counts = batch
    hidden = model.model(input_ids=token_ids).last_hidden_state[counts]
    return model.lm_head(hidden).flatten(0, -2).float()


def distillation_loss(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> Loss:
    """KL(target || draft), on which acceptance depends, up to the target's entropy."""

    def loss(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            wanted = logits_of(target, batch).softmax(-1)
        return functional.cross_entropy(logits_of(draft, batch), wanted)

    return loss


@torch.no_grad()
def acceptance(
    draft: LlamaForCausalLM, target: LlamaForCausalLM, batches: Iterable[Batch]
) -> dict[str, float]:
    """How often greedy and sampled drafts are accepted after the batches' tokens."""
    found = []
    for batch in batches:
        p, q = logits_of(target, batch), logits_of(draft, batch)
        same = (p.argmax(-1) == q.argmax(-1)).float()
        overlap = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1)
        found.append(torch.stack([same, overlap]))
    names = ("greedy_agreement", "sampled_acceptance")
    return dict(zip(names, torch.cat(found, dim=1).mean(1).tolist(), strict=True))
