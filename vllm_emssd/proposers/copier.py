"""What a request may copy: from its own text, or from a reference it brought.

Copies of one kind come from the same source after a match of about the same length. Of
the possible copies that of the kind is taken that was accepted longest in this request,
else in all requests; before anything was verified, the longer match wins.

Once a request has copied a stretch of its prompt, the prompt is its reference: an
edit of a text in the prompt is followed like that of a reference it brought.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from vllm_emssd.proposers.ngram_index import NgramIndex
from vllm_emssd.proposers.reference import ReferencePointer, Standing

_PRIOR_TESTS = 3.0  # copied tokens that the guess by match length is worth
_FORGET = 0.9  # weight kept by what was seen before, each time
_POOL_FORGET = 0.98  # the same of all requests' copies, each step that has news
_IDLE_FORGET = 0.98  # each time a copy is not worth it, so that it is tried again
_WORTHLESS = 0.1  # acceptance below which nothing is copied
_INDEXED_A_STEP = 32768  # tokens of all requests: more would stall a step
_REFERENCE_HEAD_START = 8  # tokens of a match that a reference is worth by itself
_PROMPT_STRETCH = 16  # tokens of the prompt repeated, to take it as the reference
_STANDING_PRIOR = {Standing.EDITS: 0.85, Standing.GUESSES: 0.5}

_OWN_TEXT = "own text"
_Kind = tuple[str, int]  # source, binary logarithm of the match length


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

    def acceptance(self, prior: float, prior_tests: float = _PRIOR_TESTS) -> float:
        if not self.tested:
            return prior
        accepted = self.accepted + prior_tests * prior
        return accepted / (self.tested + prior_tests)

    def observe(
        self,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        keep: float = _FORGET,
    ) -> None:
        self.fade(keep)
        self.accepted += num_accepted_tokens
        self.tested += min(num_accepted_tokens + 1, num_draft_tokens)

    def fade(self, keep: float = _IDLE_FORGET) -> None:
        self.accepted *= keep
        self.tested *= keep


@dataclass(slots=True)
class _RequestCopies:
    """The sources of one request and its record."""

    index: NgramIndex
    num_prompt_tokens: int
    alignment: ReferencePointer | None
    num_aligned: int  # tokens of the text that the alignment has seen
    records: dict[_Kind, AcceptanceRecord] = field(default_factory=dict)
    pending: Copy | None = None  # not yet verified


class Copier:
    """Finds what each request may copy; knows how its copies fared.

    Args:
        check_length: tokens that must agree before anything is copied, >= 1.
    """

    def __init__(self, check_length: int) -> None:
        self._check_length = check_length
        self._references: dict[str, np.ndarray] = {}
        self._pools: dict[_Kind, AcceptanceRecord] = {}  # of all requests
        self._faded: set[_Kind] = set()  # pools that have faded in this step
        self._requests: dict[str, _RequestCopies] = {}
        self._num_to_index = _INDEXED_A_STEP  # tokens, in this step

    def add_reference(self, req_id: str, token_ids: np.ndarray) -> None:
        """A request brought a text to copy from. `token_ids`: [num_tokens] valid ids,
        perhaps none. Before the request is first looked at."""
        self._references[req_id] = token_ids

    def begin_step(self) -> None:
        """All copies of the step before have been observed."""
        self._faded.clear()
        self._num_to_index = _INDEXED_A_STEP

    def find(
        self, req_id: str, token_ids: np.ndarray, num_prompt_tokens: int, length: int
    ) -> Copy:
        """At most `length` tokens to go on with, none where nothing is likely.

        Args:
            token_ids: [num_tokens] prompt and answer, all known tokens.
        """
        request = self._up_to_date(req_id, token_ids, num_prompt_tokens)
        if request is None:
            return NO_COPY
        best = max(self._copies(request, length), key=lambda c: c.gain, default=NO_COPY)
        if best.token_ids and best.acceptance < _WORTHLESS:
            request.records.get(best.kind, self._pools[best.kind]).fade()
            return NO_COPY
        return best

    def record_proposed(self, req_id: str, copy: Copy) -> None:
        """These are the request's drafts now."""
        self._requests[req_id].pending = copy

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        """The target verified the first tokens of the copy proposed last, if any."""
        request = self._requests.get(req_id)
        if request is None or request.pending is None:
            return
        copy, request.pending = request.pending, None
        if num_draft_tokens:
            verified = (num_draft_tokens, num_accepted_tokens)
            record = request.records.setdefault(copy.kind, AcceptanceRecord())
            record.observe(*verified)
            pool = self._pools.setdefault(copy.kind, AcceptanceRecord())
            # Once a step, however many requests there are: all of its news counts.
            pool.observe(*verified, 1.0 if copy.kind in self._faded else _POOL_FORGET)
            self._faded.add(copy.kind)
            self._maybe_follow_prompt(request, copy, num_accepted_tokens)

    def _maybe_follow_prompt(
        self, request: _RequestCopies, copy: Copy, num_accepted_tokens: int
    ) -> None:
        end, run = copy.source + num_accepted_tokens, copy.match_len
        run += num_accepted_tokens
        if (
            request.alignment is None
            and copy.kind[0] == _OWN_TEXT
            and run >= _PROMPT_STRETCH
            and end <= request.num_prompt_tokens
        ):
            tokens = request.index.tokens  # what was known when the copy was found
            prompt = np.array(tokens[: request.num_prompt_tokens], dtype=np.int32)
            request.alignment = ReferencePointer(prompt, self._check_length)
            request.alignment.start_at(end, run)
            request.num_aligned = len(tokens) + num_accepted_tokens

    def release(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._requests.pop(req_id, None)
            self._references.pop(req_id, None)

    def _up_to_date(
        self, req_id: str, token_ids: np.ndarray, num_prompt_tokens: int
    ) -> _RequestCopies | None:
        """None while a long prompt is not wholly indexed."""
        request = self._requests.get(req_id)
        if request is None or request.index.num_indexed > len(token_ids):
            request = self._requests[req_id] = self._new_request(
                req_id, num_prompt_tokens
            )
        num_indexed = request.index.num_indexed
        end = min(len(token_ids), num_indexed + self._num_to_index)
        self._num_to_index -= end - num_indexed
        request.index.extend(token_ids[:end])
        if end < len(token_ids):
            return None
        if request.alignment is not None:
            request.alignment.advance(request.index.tokens, request.num_aligned)
            request.num_aligned = len(token_ids)
        return request

    def _new_request(self, req_id: str, num_prompt_tokens: int) -> _RequestCopies:
        reference, alignment = self._references.get(req_id), None
        if reference is not None and len(reference):
            alignment = ReferencePointer(reference, self._check_length)
        index = NgramIndex(self._check_length)
        return _RequestCopies(index, num_prompt_tokens, alignment, num_prompt_tokens)

    def _copies(self, request: _RequestCopies, length: int) -> list[Copy]:
        """The reference's first: of equals it is taken."""
        copies = []
        if request.alignment is not None:
            standing, run = request.alignment.standing, request.alignment.run
            match_len = run + _REFERENCE_HEAD_START
            prior = _STANDING_PRIOR.get(standing, match_len / (match_len + 1))
            kind = (standing.value, run.bit_length())
            copied = request.alignment.continuation(length)
            copies.append(self._copy(request, copied, kind, prior))
        match = request.index.longest_match()
        if match is not None:
            source, match_len = match
            tokens = request.index.tokens
            # A copy that reaches the end goes on with what it just copied.
            period = len(tokens) - source
            copied = [tokens[source + j % period] for j in range(length)]
            kind = (_OWN_TEXT, match_len.bit_length())
            prior = match_len / (match_len + 1)
            copy = self._copy(request, copied, kind, prior)
            copies.append(replace(copy, source=source, match_len=match_len))
        return copies

    def _copy(
        self, request: _RequestCopies, token_ids: list[int], kind: _Kind, guess: float
    ) -> Copy:
        """`guess`: acceptance before any of the kind was verified."""
        pool, record = self._pools.get(kind), request.records.get(kind)
        pooled = guess if pool is None else pool.acceptance(guess)
        acceptance = pooled if record is None else record.acceptance(pooled)
        return Copy(token_ids, acceptance, kind)
