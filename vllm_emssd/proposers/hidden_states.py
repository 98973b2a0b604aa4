"""The target's hidden states of tokens that an EAGLE head was not fed yet.

The target computes them once. While a request makes no drafts they wait here, in a
buffer that all requests share. Where it is full, the oldest states of the request that
has the most are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

MOST_BYTES = 256 << 20  # of the buffer, unless a step's own tokens need more
MOST_OF_A_REQUEST = 2048  # tokens; a step's own, too, where they are more


@dataclass(slots=True)
class _Span:
    start: int  # position of the first state
    rows: list[int] = field(default_factory=list)  # of the buffer, one a position

    @property
    def end(self) -> int:
        return self.start + len(self.rows)


class HiddenStates:
    """States by request and position, those of a request without gaps.

    Args:
        max_num_tokens: most tokens of a step, all of which must find room.
        most_bytes: of the buffer; made with the first states, whose width it has.
        most_of_a_request: tokens.
    """

    def __init__(
        self,
        max_num_tokens: int,
        most_bytes: int = MOST_BYTES,
        most_of_a_request: int = MOST_OF_A_REQUEST,
    ) -> None:
        self._max_num_tokens = max_num_tokens
        self._most_bytes = most_bytes
        self._most_of_a_request = max(most_of_a_request, max_num_tokens)
        self._buffer: torch.Tensor | None = None  # [rows, width]
        self._free: list[int] = []
        self._spans: dict[str, _Span] = {}

    def keep(
        self,
        req_ids: Sequence[str],
        starts: np.ndarray,
        lens: np.ndarray,
        first_rows: np.ndarray,
        states: Sequence[torch.Tensor],
    ) -> None:
        """Take in a step's states of positions `starts` on, `lens` of each request.

        Positions before stay, if there is no gap; those that a request has computed
        again are replaced.

        Args:
            starts, lens, first_rows: [num_reqs] int64; the last says which row of
                `states` is a request's first.
            states: [num_rows, any width] each; put side by side.
        """
        buffer = self._buffer if self._buffer is not None else self._make(states)
        self._make_room(int(lens.sum()))
        rows: list[int] = []
        each = zip(req_ids, starts.tolist(), lens.tolist(), strict=True)
        for req_id, start, length in each:
            span = self._spans.get(req_id)
            if span is None or not span.start <= start <= span.end:
                self.release([req_id])
                span = self._spans[req_id] = _Span(start)
            self._cut(span, start)
            self._drop_oldest(span, len(span.rows) + length - self._most_of_a_request)
            taken = self._free[len(self._free) - length :]
            del self._free[len(self._free) - length :]
            span.rows += taken
            rows += taken
        source: slice | torch.Tensor = slice(len(rows))  # no draft was rejected
        if (first_rows + lens).max(initial=0) > len(rows):
            within = np.arange(len(rows)) - np.repeat(np.cumsum(lens) - lens, lens)
            source = torch.from_numpy(np.repeat(first_rows, lens) + within)
            source = source.to(buffer.device)
        buffer[torch.tensor(rows, device=buffer.device)] = torch.cat(
            [of_layer[source] for of_layer in states], dim=-1
        )

    def first(self, req_id: str) -> int:
        """The first position of which the state is here; where none is, the next that
        the target computes."""
        return self._spans[req_id].start

    def of(
        self, req_ids: Sequence[str], starts: np.ndarray, ends: np.ndarray
    ) -> torch.Tensor:
        """States of positions `starts` up to, not including, `ends` of each request.
        Shapes: [num_reqs] int64 -> [(ends - starts).sum(), width]"""
        rows: list[int] = []
        each = zip(req_ids, starts.tolist(), ends.tolist(), strict=True)
        for req_id, start, end in each:
            span = self._spans[req_id]
            if not span.start <= start <= end <= span.end:
                raise ValueError(
                    f"hidden states of {req_id} are kept from {span.start} to "
                    f"{span.end}, not from {start} to {end}"
                )
            rows += span.rows[start - span.start : end - span.start]
        assert self._buffer is not None
        return self._buffer[torch.tensor(rows, device=self._buffer.device)]

    def forget_before(self, req_id: str, position: int) -> None:
        """States before `position` will not be needed any more."""
        span = self._spans[req_id]
        self._drop_oldest(span, position - span.start)

    def release(self, req_ids: Iterable[str]) -> None:
        """Forget finished requests."""
        for req_id in req_ids:
            span = self._spans.pop(req_id, None)
            if span is not None:
                self._free += span.rows

    def _cut(self, span: _Span, position: int) -> None:
        """Drop states from `position` on."""
        self._free += span.rows[position - span.start :]
        del span.rows[position - span.start :]

    def _drop_oldest(self, span: _Span, number: int) -> None:
        number = min(max(number, 0), len(span.rows))
        self._free += span.rows[:number]
        del span.rows[:number]
        span.start += number

    def _make_room(self, num_rows: int) -> None:
        while len(self._free) < num_rows:
            longest = max(self._spans.values(), key=lambda span: len(span.rows))
            self._drop_oldest(longest, (len(longest.rows) + 1) // 2)

    def _make(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        width = sum(of_layer.shape[-1] for of_layer in states)
        some = states[0]
        affordable = self._most_bytes // (width * some.element_size())
        num_rows = max(affordable, self._max_num_tokens)
        self._free = list(range(num_rows - 1, -1, -1))
        self._buffer = some.new_empty(num_rows, width)
        return self._buffer
