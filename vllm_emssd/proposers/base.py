"""What every proposer is given and must offer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """One step's batch, seen after the target sampled from it.

    `token_ids` holds the known tokens: prompt and output, the tokens sampled in
    this step included, no drafts. A request is *sampling* once its prompt is
    computed; until then it is in (chunked) prefill and wants no drafts.
    """

    req_ids: list[str]  # batch row -> request id
    token_ids: np.ndarray  # [max_num_reqs, max_model_len] int32
    num_tokens: np.ndarray  # [num_reqs] int64: known tokens
    num_prompt_tokens: np.ndarray  # [num_reqs] int64
    num_prefilled_tokens: np.ndarray  # [num_reqs] int64: computed + scheduled
    is_sampling: np.ndarray  # [num_reqs] bool
    max_draft_tokens: np.ndarray  # [num_reqs] int64: most drafts it may get, >= 0

    def __post_init__(self) -> None:
        num_reqs = len(self.req_ids)
        for name in (
            "num_tokens",
            "num_prompt_tokens",
            "num_prefilled_tokens",
            "is_sampling",
            "max_draft_tokens",
        ):
            if len(getattr(self, name)) != num_reqs:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for "
                    f"{num_reqs} requests"
                )

    @property
    def num_reqs(self) -> int:
        return len(self.req_ids)


class Proposer(Protocol):
    """Makes drafts. State is keyed by request id; batch rows change between steps."""

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        """Draft token ids of each batch row, at most `max_draft_tokens`, maybe none."""
        ...

    def release(self, req_ids: Iterable[str]) -> None:
        """Forget requests that finished or were aborted."""
        ...
