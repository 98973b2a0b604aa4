"""What every proposer is given and must offer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, cast

import numpy as np

from vllm_emssd.config import PROPOSER_GROUP, EmssdConfig, plugin_proposers
from vllm_emssd.draft_length import Copies, StepInfo
from vllm_emssd.proposers.copy_lengths import CopyLengths


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
    num_scheduled_tokens: np.ndarray  # [num_reqs] int64: of this step
    num_prefilled_tokens: np.ndarray  # [num_reqs] int64: computed + scheduled
    is_sampling: np.ndarray  # [num_reqs] bool
    max_draft_tokens: np.ndarray  # [num_reqs] int64: most drafts it may get, >= 0
    copies: Copies | None = None  # of requests that make no drafts

    @property
    def num_reqs(self) -> int:
        return len(self.req_ids)

    @property
    def computes_prompt(self) -> np.ndarray:
        """Whether this step computed part of a request's prompt. [num_reqs] bool"""
        num_computed = self.num_prefilled_tokens - self.num_scheduled_tokens
        return np.asarray(num_computed < self.num_prompt_tokens)

    def step_info(
        self, max_draft_tokens: np.ndarray, missing_rows: np.ndarray
    ) -> StepInfo:
        """What a draft-length policy is told. Both [num_reqs] int64."""
        return StepInfo(
            self.req_ids,
            self.is_sampling,
            np.where(self.is_sampling, max_draft_tokens, 0),
            missing_rows,
            int(self.num_scheduled_tokens[~self.is_sampling].sum()),
            self.copies,
        )


class Proposer(Protocol):
    """Makes drafts. State is keyed by request id; batch rows change between steps."""

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        """Draft token ids of each batch row, at most `max_draft_tokens`, maybe none."""
        ...

    def record_verified(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        """The target verified the first drafts of a request and accepted a prefix.

        Called before the next `propose` in which the request is, for every one that was
        proposed drafts; with 0, if none were verified.
        """
        ...

    def release(self, req_ids: Iterable[str]) -> None:
        """Forget requests that finished or were aborted."""
        ...


# What an entry point of the group `vllm_emssd.proposers` names: a class or a function.
# CONTRIBUTING.md shows one.
MakeProposer = Callable[[EmssdConfig, CopyLengths], Proposer]


def plugin_proposer(name: str) -> MakeProposer | None:
    """Loads the entry point of that name; None where no package brings it.

    Raises: whatever importing it raises; RuntimeError where two packages bring it.
    """
    if name not in plugin_proposers():
        return None
    found = entry_points(group=PROPOSER_GROUP, name=name)
    places = sorted({entry.value for entry in found})
    if len(places) > 1:
        raise RuntimeError(
            f"proposer {name!r} is brought by several packages: {', '.join(places)}. "
            "Uninstall all but one."
        )
    return cast(MakeProposer, next(iter(found)).load())
