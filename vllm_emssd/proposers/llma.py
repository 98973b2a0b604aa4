"""Drafts copied from the request's own text (LLMA, arXiv 2304.04487).

Where the last `check_length` tokens occurred before, what followed then is
proposed again. Among several occurrences the one whose preceding text agrees
longest is copied, the latest of equals. EMS-SD uses lengths 2 and 7.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vllm_emssd.draft_length import DraftLengthPolicy
from vllm_emssd.proposers.base import DraftBatch

MAX_CANDIDATES = 32  # latest occurrences compared, bounds the work of a step
MAX_MATCH_LENGTH = 32  # longest agreement told apart


class OccurrenceIndex:
    """Where each run of `check_length` tokens ended, in one growing token list.

    Adding a token is O(1); nothing is ever scanned again.
    """

    __slots__ = ("_check_length", "_ends", "_num_indexed")

    def __init__(self, check_length: int) -> None:
        self._check_length = check_length
        self._ends: dict[tuple[int, ...], list[int]] = {}  # run -> ends, exclusive
        self._num_indexed = 0

    def extend(self, token_ids: np.ndarray) -> None:
        """Take in the tokens added since the last call. `token_ids`: [num_tokens]."""
        length = self._check_length
        first = max(self._num_indexed - length + 1, 0)
        tail = token_ids[first:].tolist()
        runs = zip(*(tail[i:] for i in range(length)), strict=False)
        for end, run in enumerate(runs, first + length):
            self._ends.setdefault(run, []).append(end)
        self._num_indexed = len(token_ids)

    @property
    def num_indexed(self) -> int:
        return self._num_indexed

    def longest_match(self, token_ids: np.ndarray) -> int | None:
        """End of the earlier occurrence to copy from, or None. All tokens must be in
        the index. `token_ids`: [num_tokens]."""
        num_tokens = len(token_ids)
        if num_tokens <= self._check_length:
            return None
        run = tuple(token_ids[-self._check_length :].tolist())
        ends = self._ends[run]  # its last entry is the run at the very end
        if len(ends) < 2:
            return None
        candidates = np.array(ends[-MAX_CANDIDATES - 1 : -1])
        if len(candidates) == 1:
            return int(candidates[0])
        back = np.arange(1, MAX_MATCH_LENGTH + 1)
        wanted = token_ids[np.maximum(num_tokens - back, 0)]
        found = candidates[:, None] - back  # [num_candidates, MAX_MATCH_LENGTH]
        agrees = (found >= 0) & (token_ids[np.maximum(found, 0)] == wanted)
        match_lens = np.logical_and.accumulate(agrees, axis=1).sum(axis=1)
        return int(candidates[len(match_lens) - 1 - match_lens[::-1].argmax()])


class LlmaProposer:
    """Copies from prompt and output of the request itself.

    Args:
        check_length: tokens that must agree before anything is copied, >= 1.
        copy_length: most tokens copied a step, >= 1.
    """

    def __init__(
        self, check_length: int, copy_length: int, policy: DraftLengthPolicy
    ) -> None:
        self._check_length = check_length
        self._copy_length = copy_length
        self._policy = policy
        self._indexes: dict[str, OccurrenceIndex] = {}

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        draft_lens = self._policy.draft_lengths(
            np.minimum(batch.max_draft_tokens, self._copy_length)
        )
        drafts: list[list[int]] = [[] for _ in batch.req_ids]
        for i in np.flatnonzero(batch.is_sampling & (draft_lens > 0)):
            known = batch.token_ids[i, : batch.num_tokens[i]]
            drafts[i] = self._copy(batch.req_ids[i], known, int(draft_lens[i]))
        return drafts

    def release(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._indexes.pop(req_id, None)

    def _copy(self, req_id: str, token_ids: np.ndarray, length: int) -> list[int]:
        index = self._indexes.get(req_id)
        if index is None or index.num_indexed > len(token_ids):
            index = self._indexes[req_id] = OccurrenceIndex(self._check_length)
        index.extend(token_ids)
        source = index.longest_match(token_ids)
        if source is None:
            return []
        # A copy that reaches the end of the text goes on with what it just copied.
        period = len(token_ids) - source
        copied: list[int] = token_ids[source + np.arange(length) % period].tolist()
        return copied
