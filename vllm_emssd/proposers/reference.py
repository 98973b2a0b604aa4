"""Follows a reference that the answer mostly repeats, through the answer's edits.

While the answer agrees with the reference, the next tokens are those behind the
pointer. Where it departs, what it wrote instead is collected until the end of the text
occurs in the reference again. Replacements are remembered: an identifier that is
changed throughout costs a rejection the first time, not every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_emssd.proposers.ngram_index import MAX_MATCH_LENGTH, NgramIndex

_NEAR = 64  # tokens: a match at most so far ahead needs `check_length` equal tokens
_FAR_MATCH_LENGTH = 8  # equal tokens that one farther ahead, or behind, needs
_LONGEST_EDIT = 16  # tokens replaced or written, for an edit to be remembered
_ANCHOR_WINDOW = 8  # tokens behind a departure, where one equal token is enough
_MAX_GUESSES = 2  # tokens of a departure taken to replace as many
_LONGEST_DEPARTURE = 128  # tokens: a longer one is a text of its own
_INDEXED_A_STEP = 16384  # tokens of a long reference, so that no step stalls
_START = -1  # no token id: stands before the reference


@dataclass(slots=True)
class _Edit:
    old: tuple[int, ...]
    new: tuple[int, ...]
    held: bool = True  # made, the last time it could have been


class ReferencePointer:
    """The pointer of one request into its reference.

    Args:
        reference: [num_reference_tokens] token ids, all >= 0.
        check_length: tokens that must agree to find the way back.
    """

    def __init__(self, reference: np.ndarray, check_length: int) -> None:
        self._reference_np = reference
        self._reference: list[int] = reference.tolist()
        self._check_length = check_length
        self._index = NgramIndex(check_length)
        self._tail_length = max(MAX_MATCH_LENGTH, check_length)  # to find the way back
        self._insertions: dict[int, _Edit] = {}  # by the token before
        self._replacements: dict[int, _Edit] = {}  # by the first token replaced
        self._position = 0  # of the next reference token
        self._departure: list[int] | None = None  # written since the answer departed
        self._has_just_edited = False  # right before the pointer
        self.run = 0  # tokens followed since the pointer was last found anew

    def advance(self, text: list[int], start: int) -> None:
        """The answer grew by `text[start:]`. O(1) for each token."""
        if len(self._index.tokens) < len(self._reference):
            most = len(self._index.tokens) + _INDEXED_A_STEP
            self._index.extend(self._reference_np[:most])
        for i in range(start, len(text)):
            if self._departure is None:
                self._follow(text[i])
            else:
                self._departure.append(text[i])
            if self._departure is not None:
                self._find_back(text[max(i + 1 - self._tail_length, 0) : i + 1])

    def continuation(self, length: int) -> list[int]:
        """At most `length` tokens that the answer may go on with, perhaps none."""
        if self._departure is None:
            return self._walk(self._position, length, self._has_just_edited)
        edit = self._begun_edit()
        if edit is not None:
            rest = list(edit.new[len(self._departure) :])
            behind = self._position + len(edit.old)
            return (rest + self._walk(behind, length, True))[:length]
        guess = self._guess_behind_departure()
        return [] if guess is None else self._walk(guess, length, True)

    @property
    def has_departed(self) -> bool:
        """Whether the answer wrote something else, and was not found again since."""
        return self._departure is not None

    # ------------------------------------------------------------ following

    def _follow(self, token: int) -> None:
        edit = self._edit_at(self._position, self._has_just_edited)
        if self._is_at(self._position, token):
            if edit is not None:
                edit.held = False
            self.resume_at(self._position + 1, self.run + 1)
        elif edit is not None and not edit.new:
            # It leaves out, so its first sign is the token behind.
            self._departure = [token]
            behind = self._position + len(edit.old)
            if self._is_at(behind, token):
                edit.held = True
                self.resume_at(behind + 1, self.run + 1)
        else:
            self._departure = [token]

    def _is_at(self, position: int, token: int) -> bool:
        return position < len(self._reference) and self._reference[position] == token

    def _find_back(self, tail: list[int]) -> None:
        """`tail`: the end of the text, as much as tells matches apart."""
        departure = self._departure
        assert departure is not None
        edit = self._begun_edit()
        if edit is not None:
            if len(edit.new) == len(departure):
                edit.held = True
                self.resume_at(self._position + len(edit.old), self.run)
                self._has_just_edited = True
            return
        match = self._match(tail) if len(departure) >= self._check_length else None
        if match is not None:
            end, agreed = match
            self._remember_edit(end, agreed)
            self.resume_at(end, agreed)
        elif len(departure) >= _LONGEST_DEPARTURE:
            del departure[: -self._tail_length]

    def _match(self, tail: list[int]) -> tuple[int, int] | None:
        """The longest of those near the pointer, if any, unless a far one is longer."""
        best: tuple[int, int] | None = None
        for end, agreed in self._index.matches_near(tail, self._position):
            is_near = 0 < end - self._position <= _NEAR
            if (is_near or agreed >= _FAR_MATCH_LENGTH) and (
                best is None or agreed > best[1]
            ):
                best = end, agreed
        return best

    def resume_at(self, position: int, run: int) -> None:
        """The answer was found to repeat the reference up to here, `run` tokens."""
        self._position, self._departure = position, None
        self._has_just_edited = False
        self.run = run

    # ------------------------------------------------------------ edits

    def _remember_edit(self, end: int, agreed: int) -> None:
        """What stood between the departure and the match, and what stands there now.
        The edit may be made again wherever the same tokens occur."""
        assert self._departure is not None
        start = self._position
        common = min(agreed, len(self._departure), end - start)
        if common <= 0:
            return  # the answer went back
        old = tuple(self._reference[start : end - common])
        new = tuple(self._departure[: len(self._departure) - common])
        if max(len(old), len(new)) > _LONGEST_EDIT:
            return
        if old:
            self._replacements[old[0]] = _Edit(old, new)
        else:
            before = self._reference[start - 1] if start else _START
            self._insertions[before] = _Edit(old, new)

    def _edit_at(self, position: int, has_just_edited: bool) -> _Edit | None:
        """What the answer last wrote instead of the reference at such a place."""
        if position >= len(self._reference):
            return None
        before = self._reference[position - 1] if position else _START
        edit = self._insertions.get(before)
        if edit is not None and not has_just_edited:  # no insertion is made twice
            return edit
        edit = self._replacements.get(self._reference[position])
        if edit is None:
            return None
        end = position + len(edit.old)
        return edit if tuple(self._reference[position:end]) == edit.old else None

    def _begun_edit(self) -> _Edit | None:
        """The known edit that the departure so far is the beginning of."""
        assert self._departure is not None
        edit = self._edit_at(self._position, self._has_just_edited)
        if edit is None or edit.new[: len(self._departure)] != tuple(self._departure):
            return None
        return edit

    def _walk(self, position: int, length: int, has_just_edited: bool) -> list[int]:
        """The reference from `position` on, edited as before."""
        tokens: list[int] = []
        while len(tokens) < length and position < len(self._reference):
            edit = self._edit_at(position, has_just_edited)
            has_just_edited = edit is not None and edit.held
            if edit is not None and edit.held:
                tokens += edit.new
                position += len(edit.old)
            else:
                tokens.append(self._reference[position])
                position += 1
        return tokens[:length]

    def _guess_behind_departure(self) -> int | None:
        """Where the reference may go on: behind the next token equal to the last one,
        else behind as many tokens as were written instead."""
        assert self._departure is not None
        window = self._reference[self._position : self._position + _ANCHOR_WINDOW]
        if self._departure[-1] in window:
            return self._position + window.index(self._departure[-1]) + 1
        if len(self._departure) <= _MAX_GUESSES:
            return self._position + len(self._departure)
        return None
