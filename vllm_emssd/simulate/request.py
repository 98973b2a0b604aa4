"""A request in the simulated batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vllm_emssd.simulate.traces import RequestTrace


@dataclass(slots=True)
class SimulatedRequest:
    """What the engine knows of a request, and what the trace says it will."""

    req_id: str
    trace: RequestTrace
    max_tokens: int
    token_ids: np.ndarray  # [max_model_len] int32: all it will ever know
    num_tokens: int  # known
    num_computed: int = 0
    drafts: list[int] = field(default_factory=list)  # for the next step
    # Of the current step:
    num_scheduled: int = 0
    num_sampled: int = 0
    is_decode: bool = False  # the prompt was computed before

    @property
    def num_prompt(self) -> int:
        return len(self.trace.prompt_ids)

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def num_acceptable(self) -> int:
        """Of drafts made now, how many will be accepted."""
        accepted = self.trace.accepted
        return accepted[self.num_output] if self.num_output < len(accepted) else 0

    @property
    def has_ended(self) -> bool:
        return self.num_output >= self.max_tokens

    def schedule(self, budget: int) -> int:
        """Take as many of `budget` rows as there are to compute. Returns how many."""
        num_known = self.num_tokens - self.num_computed
        self.num_scheduled = min(num_known + len(self.drafts), budget)
        self.is_decode = self.num_computed >= self.num_prompt
        if self.num_scheduled:
            del self.drafts[max(self.num_scheduled - num_known, 0) :]
        return self.num_scheduled

    def sample(self) -> int:
        """The target computed the scheduled rows. Returns the drafts it accepted."""
        self.num_sampled = 0
        if self.num_computed + self.num_scheduled < self.num_tokens:
            self.num_computed += self.num_scheduled  # more prompt to come
            return 0
        num_accepted = self.num_accepted()
        self.num_sampled = num_accepted + 1
        self.num_tokens += self.num_sampled
        self.num_computed = self.num_tokens - 1  # all but the one just sampled
        return num_accepted

    def num_accepted(self) -> int:
        """Leading drafts that are the output's own next tokens."""
        output_ids, start = self.trace.output_ids, self.num_output
        for i, draft in enumerate(self.drafts):
            if draft != output_ids[start + i]:
                return i
        return len(self.drafts)
