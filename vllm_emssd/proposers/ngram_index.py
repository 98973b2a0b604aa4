"""Where each run of a few tokens occurred in a text: found in O(1), grown in O(1)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

MAX_CANDIDATES = 32  # occurrences compared, bounds the work of a step
MAX_MATCH_LENGTH = 32  # longest agreement told apart


class NgramIndex:
    """Of runs of `check_length` tokens, in one list of tokens."""

    __slots__ = ("_check_length", "_ends", "tokens")

    def __init__(self, check_length: int) -> None:
        self._check_length = check_length
        self._ends: dict[tuple[int, ...], list[int]] = {}  # run -> ends, exclusive
        self.tokens: list[int] = []  # all that is indexed

    def extend(self, token_ids: np.ndarray) -> None:
        """Take in the tokens added since the last call. `token_ids`: [num_tokens]."""
        length, tokens = self._check_length, self.tokens
        first = max(len(tokens) - length + 1, 0)
        tokens += token_ids[len(tokens) :].tolist()
        for start in range(first, len(tokens) - length + 1):
            end = start + length
            self._ends.setdefault(tuple(tokens[start:end]), []).append(end)

    def longest_match(self) -> tuple[int, int] | None:
        """The earlier occurrence of the text's end to copy from: where it ends, and how
        many tokens agree before there (up to MAX_MATCH_LENGTH), the latest of equals.
        """
        tokens = self.tokens
        if len(tokens) <= self._check_length:
            return None
        ends = self._ends[tuple(tokens[-self._check_length :])]
        best, longest = 0, 0
        for end in reversed(ends[-MAX_CANDIDATES - 1 : -1]):  # the last is the end
            # A longer agreement must hold at this token too; most do not.
            if end <= longest or tokens[end - 1 - longest] != tokens[-1 - longest]:
                continue
            length = self._agreement(end, tokens)
            if length > longest:
                best, longest = end, length
            if length >= MAX_MATCH_LENGTH:
                break
        return (best, longest) if longest else None

    def matches_near(self, text: Sequence[int], position: int) -> list[tuple[int, int]]:
        """Where the end of another text occurs in this one: ends and how many tokens
        agree before each. Those behind `position` first, the nearest first."""
        if len(text) < self._check_length:
            return []
        ends = self._ends.get(tuple(text[-self._check_length :]), [])
        behind = bisect_right(ends, position)
        nearest = ends[behind : behind + MAX_CANDIDATES // 2]
        nearest += ends[max(behind - MAX_CANDIDATES // 2, 0) : behind][::-1]
        return [(end, self._agreement(end, text)) for end in nearest]

    def _agreement(self, end: int, text: Sequence[int]) -> int:
        """Tokens before `end` that equal the end of `text`; the run itself does."""
        length = min(self._check_length, MAX_MATCH_LENGTH)
        most = min(MAX_MATCH_LENGTH, end, len(text))
        tokens = self.tokens
        while length < most and tokens[end - 1 - length] == text[-1 - length]:
            length += 1
        return length
