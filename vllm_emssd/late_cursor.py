"""A draft cursor for a host that hears late how many drafts were accepted.

On a GPU the verdict of the target is on the device, and a host that waits for it
leaves the device idle. Which rows the drafter needs can be bounded without it: of
the drafts verified, the last `num_draft_tokens - num_fed_drafts` were never fed (one,
after a step that drafted), all others need no row whatever the verdict is. So the
host *reckons* with that many accepted: its span from the cursor to the reckoned end
has enough rows for every verdict, two for a request that drafted before. The device
moves the span by `accepted - reckoned` to where the request's text really ends, which
may feed one token again: that writes the same K/V.

What the proposer records is kept until the verdict arrives, and then recorded as if
it had been known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from vllm_emssd.draft_cursor import AdmittedRequest, DraftCursor


class LateDraftCursor:
    """Wraps a `DraftCursor`. A step goes: `reckon` with each sampling request; the
    proposer reads and records; `record_verified` for each sampling request; `settle`.
    """

    def __init__(self, cursor: DraftCursor) -> None:
        self._cursor = cursor
        self._reckoned: dict[str, int] = {}
        self._fed_ends: dict[str, int] = {}  # by the host's reckoning
        self._fed_drafts: dict[str, int] = {}

    def reckon(self, req_id: str, num_draft_tokens: int) -> int:
        """Accepted tokens to reckon with, of `num_draft_tokens` being verified."""
        unfed = max(num_draft_tokens - self._cursor.num_fed_drafts(req_id), 0)
        self._reckoned[req_id] = unfed
        return unfed

    def update_blocks(
        self,
        admitted: Iterable[AdmittedRequest],
        extended: Iterable[tuple[str, Sequence[int]]],
    ) -> None:
        self._cursor.update_blocks(admitted, extended)

    def release(self, req_id: str) -> None:
        self._cursor.release(req_id)

    def draft_len(self, req_id: str) -> int:
        return self._cursor.draft_len(req_id)

    def waits_for_another(
        self, req_ids: Sequence[str], feeds: np.ndarray
    ) -> np.ndarray:
        return self._cursor.waits_for_another(req_ids, feeds)

    def advance(self, req_id: str, draft_len: int) -> None:
        self._fed_ends[req_id] = draft_len

    def record_fed_drafts(self, req_id: str, num_fed_drafts: int) -> None:
        self._fed_drafts[req_id] = num_fed_drafts

    def record_verified(self, req_id: str, num_accepted_tokens: int) -> None:
        """The verdict, for a request that sampled in the step."""
        self._cursor.record_verified(req_id, num_accepted_tokens)
        moved_by = num_accepted_tokens - self._reckoned.pop(req_id)
        if req_id in self._fed_ends:
            self._fed_ends[req_id] += moved_by

    def settle(self) -> None:
        """All verdicts of the step are in: record what the proposer fed."""
        for req_id, end in self._fed_ends.items():
            self._cursor.advance(req_id, max(end, self._cursor.draft_len(req_id)))
        for req_id, num_fed_drafts in self._fed_drafts.items():
            self._cursor.record_fed_drafts(req_id, num_fed_drafts)
        self._fed_ends.clear()
        self._fed_drafts.clear()
