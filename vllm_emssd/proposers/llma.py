"""Drafts copied from the request's own text or its reference (LLMA, arXiv 2304.04487).

Where the last `check_length` tokens occurred before, what followed then is proposed
again; of several occurrences, after the one whose preceding text agrees longest, the
latest of equals. Once a request has copied a stretch of its prompt, the prompt is its
reference: an edit of a text in it is followed like that of a reference it brought.

Copies of one *kind* come from the same source after a match of about the same length.
The copy with the most tokens expected to be accepted is taken. That is estimated from
the length of the match, and from how copies of its kind fared in all requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.copy_lengths import LengthsByAcceptance
from vllm_emssd.proposers.ngram_index import NgramIndex
from vllm_emssd.proposers.reference import ReferencePointer

_PRIOR_TESTS = 8.0  # copied tokens that the guess by match length is worth
_FORGET = 0.995  # weight kept by what was seen before, each step that has news
_IDLE_FORGET = 0.999  # each time a copy is not worth it, so that it is tried again
_WORTHLESS = 0.1  # acceptance below which nothing is copied
_INDEXED_A_STEP = 32768  # tokens of all requests: more would stall a step
_REFERENCE_HEAD_START = 8  # tokens of a match that a reference is worth by itself,
_DEPARTED_MATCH = 1  # but so many in all while the answer has departed from it
_PROMPT_STRETCH = 16  # tokens of the prompt repeated, to take it as the reference

_OWN_TEXT, _REFERENCE = "own text", "reference"
_Kind = tuple[str, int]  # source, bit length of the match's length


@dataclass(frozen=True, slots=True)
class Copy:
    """Tokens copied, and the chance that each is accepted once all before it are."""

    token_ids: list[int]
    acceptance: float
    kind: _Kind = ("none", 0)
    source: int = 0  # where it stands in the request's text, if it does,
    match_len: int = 0  # and how many tokens agree before it

    @property
    def gain(self) -> float:
        """Expected tokens accepted."""
        return expected_accepted(self.acceptance, len(self.token_ids))


NO_COPY = Copy([], 0.0)


def expected_accepted(acceptance: float, num_drafts: int) -> float:
    """Of drafts that are each accepted with this chance once all before them are."""
    if acceptance >= 1:
        return float(num_drafts)
    return acceptance * (1 - acceptance**num_drafts) / (1 - acceptance)


@dataclass(slots=True)
class AcceptanceRecord:
    """Drafts accepted, of those tested; old ones count less."""

    accepted: float = 0.0
    tested: float = 0.0

    def acceptance(self, prior: float) -> float:
        accepted = self.accepted + _PRIOR_TESTS * prior
        return accepted / (self.tested + _PRIOR_TESTS)

    def observe(self, num_drafts: int, num_accepted: int, keep: float) -> None:
        """`keep`: the weight that older drafts keep."""
        self.fade(keep)
        self.accepted += num_accepted
        self.tested += min(num_accepted + 1, num_drafts)

    def fade(self, keep: float) -> None:
        self.accepted *= keep
        self.tested *= keep


@dataclass(slots=True)
class _RequestCopies:
    """The sources of one request."""

    index: NgramIndex
    num_prompt_tokens: int
    pointer: ReferencePointer | None
    num_followed: int  # tokens of the text that the pointer has seen
    pending: Copy | None = None  # not yet verified


class LlmaProposer:
    """Copies only.

    Args:
        check_length: tokens that must agree before anything is copied, >= 1.
        copy_length: most tokens copied a step, >= 1.
        lengths: how much of each copy is verified.
    """

    def __init__(
        self, check_length: int, copy_length: int, lengths: LengthsByAcceptance
    ) -> None:
        self._check_length = check_length
        self._copy_length = copy_length
        self._lengths = lengths
        self._references: dict[str, np.ndarray] = {}
        self._requests: dict[str, _RequestCopies] = {}
        self._records: dict[_Kind, AcceptanceRecord] = {}  # of all requests
        self._faded: set[_Kind] = set()  # records that have faded in this step
        self._idle: list[_Kind] = []  # of copies not worth it in this step
        self._num_to_index = _INDEXED_A_STEP  # tokens, in this step

    def add_reference(self, req_id: str, token_ids: np.ndarray) -> None:
        """A request brought a text to copy from. `token_ids`: [num_tokens] valid ids,
        perhaps none. Before the request is first looked at."""
        self._references[req_id] = token_ids

    def propose(self, batch: DraftBatch) -> list[list[int]]:
        return self.choose(batch, self.find(batch))

    def find(self, batch: DraftBatch) -> list[Copy]:
        """What each request may copy; `NO_COPY` for those in prefill."""
        self._faded.clear()  # all copies of the step before have been observed
        self._num_to_index = _INDEXED_A_STEP
        copies = [NO_COPY] * batch.num_reqs
        most = np.minimum(batch.max_draft_tokens, self._copy_length)
        most[~batch.is_sampling] = 0
        each = zip(
            batch.req_ids,
            batch.token_ids,
            batch.num_tokens.tolist(),
            batch.num_prompt_tokens.tolist(),
            most.tolist(),
            strict=False,  # there are more rows of token ids
        )
        for i, (req_id, token_ids, num_tokens, num_prompt, length) in enumerate(each):
            if length:
                known = token_ids[:num_tokens]
                copies[i] = self._find(req_id, known, num_prompt, length)
        # After all requests, so that their order in the batch makes no difference.
        for kind in self._idle:
            self._records[kind].fade(_IDLE_FORGET)
        self._idle.clear()
        return copies

    def choose(self, batch: DraftBatch, copies: list[Copy]) -> list[list[int]]:
        """As much of each copy as is worth its rows: the request's drafts."""
        acceptance = np.array([copy.acceptance for copy in copies])
        made = np.array([len(copy.token_ids) for copy in copies], dtype=np.int64)
        lens = self._lengths.choose(
            batch.step_info(made, np.zeros_like(made)),
            np.repeat(acceptance[:, None], self._copy_length, axis=1),
        ).tolist()
        drafts = [copy.token_ids[:n] for copy, n in zip(copies, lens, strict=True)]
        for req_id, copy, tokens in zip(batch.req_ids, copies, drafts, strict=True):
            if tokens:
                self._requests[req_id].pending = copy
        return drafts

    def record_verified(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        request = self._requests.get(req_id)
        if request is None or request.pending is None:
            return
        copy, request.pending = request.pending, None
        verified = (num_draft_tokens, num_accepted_tokens)
        if num_draft_tokens:
            record = self._records.setdefault(copy.kind, AcceptanceRecord())
            # It fades once a step, so that all requests of the step count alike.
            record.observe(*verified, 1.0 if copy.kind in self._faded else _FORGET)
            self._faded.add(copy.kind)
            self._maybe_follow_prompt(request, copy, num_accepted_tokens)

    def release(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._requests.pop(req_id, None)
            self._references.pop(req_id, None)

    # ------------------------------------------------------------ one request

    def _find(
        self, req_id: str, token_ids: np.ndarray, num_prompt_tokens: int, length: int
    ) -> Copy:
        """At most `length` tokens to go on with, none where nothing is likely.
        `token_ids`: [num_tokens] prompt and answer, all known tokens."""
        request = self._up_to_date(req_id, token_ids, num_prompt_tokens)
        if request is None:
            return NO_COPY
        best = self._copy_of_own_text(request, length)
        if request.pointer is not None:
            reference = self._copy_of_reference(request.pointer, length)
            best = reference if reference.gain >= best.gain else best
        if best.token_ids and best.acceptance < _WORTHLESS:
            self._idle.append(best.kind)
            return NO_COPY
        return best

    def _up_to_date(
        self, req_id: str, token_ids: np.ndarray, num_prompt_tokens: int
    ) -> _RequestCopies | None:
        """None while a long prompt is still being indexed."""
        request = self._requests.get(req_id)
        if request is None or len(request.index.tokens) > len(token_ids):
            reference, pointer = self._references.get(req_id), None
            if reference is not None and len(reference):
                pointer = ReferencePointer(reference, self._check_length)
            index = NgramIndex(self._check_length)
            request = _RequestCopies(
                index, num_prompt_tokens, pointer, num_prompt_tokens
            )
            self._requests[req_id] = request
        num_new = len(token_ids) - len(request.index.tokens)
        self._num_to_index -= num_new
        if self._num_to_index < 0:
            request.index.extend(token_ids[: self._num_to_index])
            self._num_to_index = 0
            return None
        request.index.extend(token_ids)
        if request.pointer is not None:
            request.pointer.advance(request.index.tokens, request.num_followed)
            request.num_followed = len(token_ids)
        return request

    def _copy_of_reference(self, pointer: ReferencePointer, length: int) -> Copy:
        kind = (_REFERENCE, pointer.run.bit_length())
        match_len = pointer.run + _REFERENCE_HEAD_START
        if pointer.has_departed:
            kind, match_len = (_REFERENCE, 0), _DEPARTED_MATCH
        acceptance = self._acceptance(kind, match_len)
        return Copy(pointer.continuation(length), acceptance, kind)

    def _copy_of_own_text(self, request: _RequestCopies, length: int) -> Copy:
        match = request.index.longest_match()
        if match is None:
            return NO_COPY
        source, match_len = match
        tokens = request.index.tokens
        # A copy that reaches the end goes on with what it just copied.
        period = len(tokens) - source
        copied = [tokens[source + j % period] for j in range(length)]
        kind = (_OWN_TEXT, match_len.bit_length())
        acceptance = self._acceptance(kind, match_len)
        return Copy(copied, acceptance, kind, source, match_len)

    def _acceptance(self, kind: _Kind, match_len: int) -> float:
        guess = match_len / (match_len + 1)
        record = self._records.get(kind)
        return guess if record is None else record.acceptance(guess)

    def _maybe_follow_prompt(
        self, request: _RequestCopies, copy: Copy, num_accepted_tokens: int
    ) -> None:
        end = copy.source + num_accepted_tokens
        run = copy.match_len + num_accepted_tokens
        if (
            request.pointer is None
            and copy.kind[0] == _OWN_TEXT
            and run >= _PROMPT_STRETCH
            and end <= request.num_prompt_tokens
        ):
            tokens = request.index.tokens  # what was known when the copy was found
            prompt = np.array(tokens[: request.num_prompt_tokens], dtype=np.int32)
            request.pointer = ReferencePointer(prompt, self._check_length)
            request.pointer.resume_at(end, run)
            request.num_followed = len(tokens) + num_accepted_tokens
