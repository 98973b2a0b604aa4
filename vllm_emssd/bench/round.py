"""What one method did in one round: time, rows, and each step's acceptance."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class RequestStep(NamedTuple):
    """One request in one target forward. A NamedTuple: there are thousands."""

    request: int  # index in the round
    num_scheduled: int  # rows of the target
    num_drafts: int
    num_sampled: int  # accepted + 1; 0 while the prompt is not wholly computed


@dataclass(slots=True)
class Round:
    """`*_forwards`: (rows, ms) of each; on a GPU ms is the launch alone, and of a model
    in full CUDA graphs only those are seen that were not replayed."""

    seconds: float = 0.0
    num_tokens: int = 0
    num_preemptions: int = 0
    propose_ms: float = 0.0  # all of drafting: models, copying, bookkeeping
    logits_ms: float = 0.0  # the drafter's
    draft_forwards: list[tuple[int, float]] = field(default_factory=list)
    target_forwards: list[tuple[int, float]] = field(default_factory=list)
    steps: list[list[RequestStep]] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)  # tokens of each request
    unfinished: set[int] = field(default_factory=set)  # outputs cut short
    emssd_stats: dict[str, int] = field(default_factory=dict)
    emssd_costs: dict[str, Any] = field(default_factory=dict)  # at its end
    profile: dict[str, float] = field(default_factory=dict)  # on GPUs: `of_a_step`

    @property
    def s_per_token(self) -> float:
        """What speeds go by: rounds may end with unequal numbers of tokens."""
        return self.seconds / max(self.num_tokens, 1)

    @property
    def draft_rows(self) -> int:
        return sum(rows for rows, _ in self.draft_forwards)

    @property
    def saw_target_forwards(self) -> bool:
        return len(self.target_forwards) >= len(self.steps)

    @property
    def target_rows(self) -> int:
        if not self.saw_target_forwards:
            return sum(entry.num_scheduled for step in self.steps for entry in step)
        return sum(rows for rows, _ in self.target_forwards)

    def decode_steps(self) -> list[RequestStep]:
        """Steps after a request's first token: those that could have had drafts."""
        seen: set[int] = set()
        decode = []
        for step in self.steps:
            for entry in step:
                if entry.request in seen:
                    decode.append(entry)
                elif entry.num_sampled:
                    seen.add(entry.request)
        return decode

    def counts(self) -> dict[str, float]:
        """Sums over the round."""
        decode = self.decode_steps()
        num_drafts = sum(entry.num_drafts for entry in decode)
        num_accepted = sum(entry.num_sampled - 1 for entry in decode)
        return {
            "seconds": self.seconds,
            "num_tokens": self.num_tokens,
            "num_steps": len(self.steps),
            "num_request_steps": len(decode),
            "num_draft_tokens": num_drafts,
            "num_accepted_tokens": num_accepted,
            "accepted_per_request_step": num_accepted / max(len(decode), 1),
            "target_rows": self.target_rows,
            "target_rows_decode": len(decode) + num_drafts,
            "draft_rows": self.draft_rows,
            "draft_forwards": len(self.draft_forwards),
            "num_preemptions": self.num_preemptions,
        }

    def step_ms(self) -> dict[str, float]:
        """How a step's time splits. Where not all target forwards were seen, what they
        took is in the rest."""
        seen = self.target_forwards if self.saw_target_forwards else []
        target_ms = sum(ms for _, ms in seen)
        draft_ms = sum(ms for _, ms in self.draft_forwards) + self.logits_ms
        parts = {
            "target": target_ms,
            "draft model": draft_ms,
            "drafting, rest": self.propose_ms - draft_ms,
            "rest": self.seconds * 1e3 - target_ms - self.propose_ms,
        }
        return {name: ms / max(len(self.steps), 1) for name, ms in parts.items()}

    def accepted_histogram(self) -> Counter[int]:
        """Request-steps by the number of drafts accepted."""
        return Counter(entry.num_sampled - 1 for entry in self.decode_steps())
