"""A draft cursor for a host that learns late how many drafts were accepted.

On a GPU that number is on the device, and a host that waits for it leaves the device
idle. The rows that the drafter needs can be bounded without it: of the drafts verified,
the last `num_draft_tokens - num_fed_drafts` were never fed (one, after a step that
drafted), all others need no row, however many are accepted. So the host *assumes* that
many accepted, which gives rows enough for every outcome, and the device moves the span
by `accepted - assumed` to where the text really ends. That may feed one token again,
which writes the same K/V.

As the number of missing rows does not depend on the outcome, any number of steps may
run before one is known. What each step fed is kept until then, and recorded as if it
had been known at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor


@dataclass(slots=True)
class _Request:
    num_tokens: int  # by the steps whose acceptance is known
    num_pending: int = 0  # steps whose acceptance is to come
    num_missing: int = 0  # known tokens, pending ones included, that lack draft K/V
    num_fed_drafts: int = 0  # of the drafts made last


@dataclass(slots=True)
class _Turn:
    """A request in a step whose acceptance is to come."""

    request: _Request
    start: int  # of the tokens without draft K/V, as the host counts
    end: int  # of the known ones
    num_fed_drafts: int  # of the drafts verified
    num_missing: int = 0  # tokens without draft K/V when the step was over


class AsyncDraftCursor:
    """Wraps a `DraftCursor`. A step goes: `assume_accepted` with each sampling request;
    the proposer reads and records; `end_step`. Once its acceptance is known, in the
    order of the steps: `record_verified` for each sampling request; `settle`.
    """

    def __init__(self, cursor: DraftCursor) -> None:
        self._cursor = cursor
        self._requests: dict[str, _Request] = {}  # that have sampled
        self._now: dict[str, _Turn] = {}  # of the step being made
        self._pending_steps: deque[dict[str, _Turn]] = deque()  # oldest step first

    def assume_accepted(
        self, req_id: str, num_tokens: int, num_draft_tokens: int
    ) -> int:
        """Accepted tokens to assume.

        Args:
            num_tokens: known before this step sampled; where earlier steps are pending,
                counted in any way, as long as the step is counted in the same.
            num_draft_tokens: being verified.
        """
        if req_id not in self._requests:
            self._requests[req_id] = _Request(num_tokens)
        request = self._requests[req_id]
        if request.num_pending == 0:
            request.num_missing = request.num_tokens - self._cursor.draft_len(req_id)
        unfed = max(num_draft_tokens - request.num_fed_drafts, 0)
        turn = _Turn(
            request,
            start=num_tokens - request.num_missing,
            end=num_tokens + 1 + unfed,
            num_fed_drafts=request.num_fed_drafts,
        )
        request.num_missing = turn.end - turn.start
        request.num_fed_drafts = 0
        if num_draft_tokens == 0 and request.num_pending == 0:
            # Nothing is uncertain: others may count on what it feeds now.
            request.num_tokens += 1
        else:
            request.num_pending += 1
        self._now[req_id] = turn
        return unfed

    def update_blocks(
        self,
        admitted: Iterable[AdmittedRequest],
        extended: Iterable[tuple[str, Sequence[int]]],
    ) -> None:
        admitted = list(admitted)
        for request in admitted:
            self._requests.pop(request.req_id, None)
        self._cursor.update_blocks(admitted, extended)

    def release(self, req_id: str) -> None:
        """Forget a request, and what it fed in steps whose acceptance is to come: its
        blocks may be another's by then."""
        self._requests.pop(req_id, None)
        self._cursor.release(req_id)

    def draft_len(self, req_id: str) -> int:
        if req_id in self._now:
            return self._now[req_id].start
        return self._cursor.draft_len(req_id)

    def waits_for_another(
        self, req_ids: Sequence[str], feeds: np.ndarray
    ) -> np.ndarray:
        return self._cursor.waits_for_another(req_ids, feeds)

    def advance(self, req_id: str, draft_len: int) -> None:
        if req_id in self._now:
            turn = self._now[req_id]
            turn.request.num_missing = turn.end - draft_len
        else:  # in prefill
            self._cursor.advance(req_id, draft_len)

    def record_fed_drafts(self, req_id: str, num_fed_drafts: int) -> None:
        if req_id in self._now:
            self._now[req_id].request.num_fed_drafts = num_fed_drafts

    def end_step(self) -> None:
        """The proposer has recorded what it fed."""
        for req_id, turn in self._now.items():
            turn.num_missing = turn.request.num_missing
            if turn.request.num_pending == 0:
                self._advance_to_known(req_id, turn)
        self._pending_steps.append(
            {r: turn for r, turn in self._now.items() if turn.request.num_pending}
        )
        self._now = {}

    def record_verified(self, req_id: str, num_accepted_tokens: int) -> None:
        """What the oldest pending step accepted, of a request that sampled in it.
        Recorded twice it counts once."""
        turn = self._pending_steps[0].pop(req_id, None)
        if turn is None or self._requests.get(req_id) is not turn.request:
            return  # recorded already, or released since
        turn.request.num_pending -= 1
        turn.request.num_tokens += 1 + num_accepted_tokens
        self._cursor.record_fed_drafts(req_id, turn.num_fed_drafts)
        self._cursor.record_verified(req_id, num_accepted_tokens)
        self._advance_to_known(req_id, turn)

    def settle(self) -> None:
        """The acceptance of the oldest step was known wholly."""
        self._pending_steps.popleft()

    def _advance_to_known(self, req_id: str, turn: _Turn) -> None:
        end = turn.request.num_tokens - turn.num_missing
        if end > self._cursor.draft_len(req_id):
            self._cursor.advance(req_id, end)
