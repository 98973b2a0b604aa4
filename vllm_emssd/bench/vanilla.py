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
    """Of a batch's decoding, prompts excluded. A slot is one position of the cache."""

    num_rows: int = 0  # fed to the target
    num_kv_slots: int = 0  # read: summed over steps and requests
    num_row_slots: int = 0  # pairs of a row and a slot: attention's work
    num_padding_slots: int = 0  # of those read, the ones that are masked for all rows
    most_padding_slots: int = 0  # held at once

    def add(self, num_rows: int, num_slots: int, num_padding: int = 0) -> None:
        """One request in one step."""
        self.num_rows += num_rows
        self.num_kv_slots += num_slots
        self.num_row_slots += num_rows * num_slots
        self.num_padding_slots += num_padding

    def __add__(self, other: DecodeCounts) -> DecodeCounts:
        """Of two batches, one after the other."""
        return DecodeCounts(
            self.num_rows + other.num_rows,
            self.num_kv_slots + other.num_kv_slots,
            self.num_row_slots + other.num_row_slots,
            self.num_padding_slots + other.num_padding_slots,
            max(self.most_padding_slots, other.most_padding_slots),
        )


def unpadded_counts(requests: Sequence[VerifiedRequest]) -> DecodeCounts:
    """EMS-SD: own rows, own cache."""
    counts = DecodeCounts()
    for request in requests:
        kv_len = request.num_prompt_tokens
        for num_drafts, num_accepted in request.steps:
            counts.add(1 + num_drafts, kv_len + 1 + num_drafts)
            kv_len += 1 + num_accepted
    return counts


def padded_input_counts(requests: Sequence[VerifiedRequest]) -> DecodeCounts:
    """The paper's "unpad KV only": rows of the longest draft, own cache."""
    counts = DecodeCounts()
    kv_lens = [request.num_prompt_tokens for request in requests]
    for step in _aligned_steps(requests):
        num_rows = 1 + max(verified.num_drafts for _, verified in step)
        for i, verified in step:
            counts.add(num_rows, kv_lens[i] + num_rows)
            kv_lens[i] += 1 + verified.num_accepted
    return counts


def vanilla_counts(requests: Sequence[VerifiedRequest]) -> DecodeCounts:
    """Rows of the longest draft, and caches padded to one length. Prompts too."""
    counts = DecodeCounts()
    kv_lens = [request.num_prompt_tokens for request in requests]
    aligned_len = max(kv_lens)
    for step in _aligned_steps(requests):
        num_rows = 1 + max(verified.num_drafts for _, verified in step)
        padding = [aligned_len - kv_lens[i] for i, _ in step]
        counts.most_padding_slots = max(counts.most_padding_slots, sum(padding))
        for (i, verified), num_padding in zip(step, padding, strict=True):
            counts.add(num_rows, aligned_len + num_rows, num_padding)
            kv_lens[i] += 1 + verified.num_accepted
        aligned_len += 1 + max(verified.num_accepted for _, verified in step)
    return counts


def _aligned_steps(
    requests: Sequence[VerifiedRequest],
) -> Iterator[list[tuple[int, Verified]]]:
    """Each step's unfinished requests: index and what was verified."""
    for verified in zip_longest(*(request.steps for request in requests)):
        yield [(i, v) for i, v in enumerate(verified) if v is not None]


def traces_of(done: Round, num_prompt_tokens: Sequence[int]) -> list[VerifiedRequest]:
    """A round's requests, in the order they were added."""
    steps: list[list[Verified]] = [[] for _ in num_prompt_tokens]
    for entry in done.decode_steps():
        steps[entry.request].append(Verified(entry.num_drafts, entry.num_sampled - 1))
    return [
        VerifiedRequest(length, of_request)
        for length, of_request in zip(num_prompt_tokens, steps, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Replay:
    """One acceptance trace under the three rules."""

    unpadded: DecodeCounts
    padded_inputs: DecodeCounts
    vanilla: DecodeCounts


def replay(done: Round, num_prompt_tokens: Sequence[int], batch_size: int) -> Replay:
    """`done`: a round with real drafts only, so one of a method that does not pad.
    num_prompt_tokens: [num_requests], of batches of `batch_size` one after the other.
    """
    traces = traces_of(done, num_prompt_tokens)
    batches = [traces[i : i + batch_size] for i in range(0, len(traces), batch_size)]
    return Replay(
        *(
            sum(map(count, batches), DecodeCounts())
            for count in (unpadded_counts, padded_input_counts, vanilla_counts)
        )
    )
