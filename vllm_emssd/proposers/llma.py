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

    def longest_match(self, token_ids: np.ndarray) -> tuple[int, int] | None:
        """The earlier occurrence to copy from: its end, and how many tokens agree
        before it (up to MAX_MATCH_LENGTH). All tokens must be in the index.
        `token_ids`: [num_tokens]."""
        num_tokens = len(token_ids)
        if num_tokens <= self._check_length:
            return None
        run = tuple(token_ids[-self._check_length :].tolist())
        ends = self._ends[run]  # its last entry is the run at the very end
        if len(ends) < 2:
            return None
        candidates = np.array(ends[-MAX_CANDIDATES - 1 : -1])
        back = np.arange(1, MAX_MATCH_LENGTH + 1)
        wanted = token_ids[np.maximum(num_tokens - back, 0)]
        found = candidates[:, None] - back  # [num_candidates, MAX_MATCH_LENGTH]
        agrees = (found >= 0) & (token_ids[np.maximum(found, 0)] == wanted)
        match_lens = np.logical_and.accumulate(agrees, axis=1).sum(axis=1)
        best = len(match_lens) - 1 - match_lens[::-1].argmax()
        return int(candidates[best]), int(match_lens[best])


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
        most = np.minimum(batch.max_draft_tokens, self._copy_length)
        drafts: list[list[int]] = [[] for _ in batch.req_ids]
        confidence = np.zeros((batch.num_reqs, self._copy_length))
        for i in np.flatnonzero(batch.is_sampling & (most > 0)):
            known = batch.token_ids[i, : batch.num_tokens[i]]
            drafts[i], match_len = self._copy(batch.req_ids[i], known, int(most[i]))
            confidence[i] = match_len / (match_len + 1)
        made = np.fromiter(map(len, drafts), np.int64, batch.num_reqs)
        nothing_missing = np.zeros(batch.num_reqs, dtype=np.int64)
        lens = self._policy.choose(batch.opportunity(made, nothing_missing), confidence)
        return [tokens[:n] for tokens, n in zip(drafts, lens, strict=True)]

    def record_verified(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        self._policy.observe(req_id, num_draft_tokens, num_accepted_tokens)

    def release(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._indexes.pop(req_id, None)
            self._policy.release(req_id)

    def _copy(
        self, req_id: str, token_ids: np.ndarray, length: int
    ) -> tuple[list[int], int]:
        """Copied tokens and the length of the match; none without a match."""
        index = self._indexes.get(req_id)
        if index is None or index.num_indexed > len(token_ids):
            index = self._indexes[req_id] = OccurrenceIndex(self._check_length)
        index.extend(token_ids)
        match = index.longest_match(token_ids)
        if match is None:
            return [], 0
        source, match_len = match
        # A copy that reaches the end of the text goes on with what it just copied.
        period = len(token_ids) - source
        copied: list[int] = token_ids[source + np.arange(length) % period].tolist()
        return copied, match_len
