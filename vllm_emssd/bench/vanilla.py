"""What EMS-SD's *vanilla* would have computed, counted exactly.

Vanilla keeps a batch aligned: every step, all requests feed as many rows as the
longest draft needs, and after it all K/V caches grow by as much as the request that
accepted most; the others get padding, which later steps read and mask. A paged cache
cannot be padded, so the counts come from replaying which drafts were made and
accepted. Acceptance does not depend on the padding, so the replay is exact.

A request that is finished leaves; in the paper's own batches it stays and costs more.
Requests of a batch start together, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from vllm_emssd.bench.round import Round


class Verified(NamedTuple):
    """One verification of one request."""

    num_drafts: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class VerifiedRequest:
    """A request after its prompt is computed and its first token is known."""

    num_prompt_tokens: int
    steps: Sequence[Verified]

    def __post_init__(self) -> None:
        for step in self.steps:
            if not 0 <= step.num_accepted <= step.num_drafts:
                raise ValueError(f"{step} accepts more than was drafted")


@dataclass(slots=True)
class DecodeCounts:
    """Of decoding, prompts excluded."""

    num_rows: int = 0  # fed to the target
    num_kv_slots: int = 0  # cache positions read: summed over steps and requests

    def add(self, num_rows: int, num_slots: int) -> None:
        """One request in one step."""
        self.num_rows += num_rows
        self.num_kv_slots += num_slots


@dataclass(slots=True)
class Replay:
    """The same drafts and acceptance under three rules."""

    unpadded: DecodeCounts  # EMS-SD: own rows, own cache
    padded_inputs: DecodeCounts  # rows of the longest draft, own cache
    vanilla: DecodeCounts  # rows of the longest draft, caches padded to one length


def replay(batches: Sequence[Sequence[VerifiedRequest]]) -> Replay:
    """Of batches one after the other, each padded by itself."""
    found = Replay(DecodeCounts(), DecodeCounts(), DecodeCounts())
    for batch in batches:
        _replay_batch(batch, found)
    return found


def _replay_batch(requests: Sequence[VerifiedRequest], found: Replay) -> None:
    kv_lens = [request.num_prompt_tokens for request in requests]
    aligned_len = max(kv_lens)  # prompts are padded too
    for step in _aligned_steps(requests):
        padded_rows = 1 + max(verified.num_drafts for _, verified in step)
        for i, verified in step:
            num_rows = 1 + verified.num_drafts
            found.unpadded.add(num_rows, kv_lens[i] + num_rows)
            found.padded_inputs.add(padded_rows, kv_lens[i] + padded_rows)
            found.vanilla.add(padded_rows, aligned_len + padded_rows)
            kv_lens[i] += 1 + verified.num_accepted
        aligned_len += 1 + max(verified.num_accepted for _, verified in step)


def _aligned_steps(
    requests: Sequence[VerifiedRequest],
) -> Iterator[list[tuple[int, Verified]]]:
    """Each step's unfinished requests: index and what was verified."""
    for verified in zip_longest(*(request.steps for request in requests)):
        yield [(i, v) for i, v in enumerate(verified) if v is not None]


def replay_round(
    done: Round, num_prompt_tokens: Sequence[int], batch_size: int
) -> Replay:
    """Of a round in whole batches of a method that does not pad.
    num_prompt_tokens: [num_requests], in the order they were added.
    """
    steps: list[list[Verified]] = [[] for _ in num_prompt_tokens]
    for entry in done.decode_steps():
        steps[entry.request].append(Verified(entry.num_drafts, entry.num_sampled - 1))
    requests = [
        VerifiedRequest(length, of_request)
        for length, of_request in zip(num_prompt_tokens, steps, strict=True)
    ]
    return replay(
        [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
    )
