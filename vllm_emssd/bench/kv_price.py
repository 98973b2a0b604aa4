"""What vanilla's K/V padding would cost: ms of a pair of a row and a cache slot.

Measured on the padded method's engine, with the workload's prompts cut short and
drawn out: forwards of as many rows over caches of different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import Round
from vllm_emssd.bench.vanilla import Replay

SHORT_TOKENS = 32
MIN_FORWARDS = 3  # of one row count, for it to count


@dataclass(frozen=True, slots=True)
class Forward:
    """One decoding step of the target."""

    num_rows: int
    num_row_slots: int
    ms: float


def stretched(requests: Sequence[Request], max_model_len: int) -> list[list[Request]]:
    """The same requests with short and with long contexts."""
    short = [
        replace(r, prompt_token_ids=r.prompt_token_ids[-SHORT_TOKENS:])
        for r in requests
    ]
    long = []
    for request in requests:
        room = max_model_len - request.max_tokens - 1
        ids = request.prompt_token_ids
        repeated = ids * (room // len(ids) + 1)
        long.append(replace(request, prompt_token_ids=repeated[-room:]))
    return [short, long]


def decode_forwards(done: Round, num_prompt_tokens: Sequence[int]) -> list[Forward]:
    """Steps without prompts. num_prompt_tokens: [num_requests] of the round."""
    if len(done.target_forwards) != len(done.steps):
        raise ValueError(
            f"{len(done.target_forwards)} forwards in {len(done.steps)} steps: "
            "the target runs more than once a step, its price cannot be told"
        )
    kv_lens = [0] * len(num_prompt_tokens)
    forwards = []
    for step, (_, ms) in zip(done.steps, done.target_forwards, strict=True):
        decodes = all(kv_lens[entry.request] for entry in step)
        num_rows = sum(entry.num_scheduled for entry in step)
        num_row_slots = sum(
            entry.num_scheduled * (kv_lens[entry.request] + entry.num_scheduled)
            for entry in step
        )
        if decodes and num_rows:
            forwards.append(Forward(num_rows, num_row_slots, ms))
        for entry in step:
            if kv_lens[entry.request]:
                kv_lens[entry.request] += entry.num_sampled
            elif entry.num_sampled:
                kv_lens[entry.request] = num_prompt_tokens[entry.request]
    return forwards


def row_slot_ms(forwards: Sequence[Forward]) -> float:
    """Slope of ms over row-slots between forwards of equally many rows.

    nan where no two of them read different caches.
    """
    by_rows: dict[int, list[Forward]] = {}
    for forward in forwards:
        by_rows.setdefault(forward.num_rows, []).append(forward)
    covariance = variance = 0.0
    for group in by_rows.values():
        if len(group) < MIN_FORWARDS:
            continue
        slots = np.array([float(f.num_row_slots) for f in group])
        ms = np.array([f.ms for f in group])
        slots -= slots.mean()
        covariance += float(slots @ np.clip(ms, None, 3 * np.median(ms)))
        variance += float(slots @ slots)
    return covariance / variance if variance else float("nan")


def estimate(
    replays: Sequence[Replay],
    unpadded: Sequence[Round],
    padded: Sequence[Round],
    ms_per_row_slot: float,
) -> dict[str, Any]:
    """Vanilla's time: that of the padded inputs, and the padded cache's on top.

    replays: of each round of the unpadded method.
    """
    extra = median(
        r.vanilla.num_row_slots - r.padded_inputs.num_row_slots for r in replays
    )
    padded_s = median(r.seconds for r in padded)
    vanilla_s = padded_s + ms_per_row_slot * extra / 1e3
    return {
        "ms_per_row_slot": ms_per_row_slot,
        "counts": asdict(replays[0]),
        "kv_padding_s": vanilla_s - padded_s,
        "vanilla_s": vanilla_s,
        "over_padded_inputs": padded_s / median(r.seconds for r in unpadded),
        "over_vanilla": vanilla_s / median(r.seconds for r in unpadded),
    }
