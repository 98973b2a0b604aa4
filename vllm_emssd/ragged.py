"""Flat rows of a ragged batch.

A forward computes *rows*: one token position of one request each, those of a request
adjacent, with no filler between requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RaggedRows:
    """The rows of one forward.

    `num_reqs` counts the requests in this forward, not in the batch. Every
    request has at least one row, and its positions are consecutive.
    """

    req_indices: np.ndarray  # [num_reqs] int64: this forward's request -> batch row
    query_start_loc: np.ndarray  # [num_reqs + 1] int32
    positions: np.ndarray  # [num_rows] int64

    @classmethod
    def from_spans(
        cls, req_indices: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> RaggedRows:
        """Positions `starts[i]` up to, not including, `ends[i]` of each request.

        Shapes: all [num_reqs], integers; no span is empty.
        """
        lens = ends - starts
        query_start_loc = np.zeros(len(lens) + 1, dtype=np.int32)
        np.cumsum(lens, out=query_start_loc[1:])
        num_rows = int(query_start_loc[-1])
        offsets = np.repeat(starts - query_start_loc[:-1], lens)
        positions = np.arange(num_rows, dtype=np.int64) + offsets
        return cls(req_indices.astype(np.int64), query_start_loc, positions)

    @classmethod
    def one_each(cls, req_indices: np.ndarray, positions: np.ndarray) -> RaggedRows:
        """One row a request, as every draft forward but a step's first has.

        Shapes: both [num_reqs] int64.
        """
        query_start_loc = np.arange(len(req_indices) + 1, dtype=np.int32)
        return cls(req_indices, query_start_loc, positions)

    @property
    def has_one_row_each(self) -> bool:
        return len(self.positions) == len(self.req_indices)

    @property
    def num_reqs(self) -> int:
        return len(self.req_indices)

    @property
    def num_rows(self) -> int:
        return len(self.positions)

    @property
    def query_lens(self) -> np.ndarray:
        """Rows of each request. [num_reqs] int32"""
        return np.diff(self.query_start_loc)

    @property
    def last_rows(self) -> np.ndarray:
        """Index of each request's last row. [num_reqs] int64"""
        return self.query_start_loc[1:].astype(np.int64) - 1

    @property
    def seq_lens(self) -> np.ndarray:
        """Context of each request, its own rows included. [num_reqs] int32"""
        if self.has_one_row_each:
            return (self.positions + 1).astype(np.int32)
        return (self.positions[self.last_rows] + 1).astype(np.int32)

    @property
    def row_req_indices(self) -> np.ndarray:
        """Batch row of the request that each row belongs to. [num_rows] int64"""
        if self.has_one_row_each:
            return self.req_indices
        return np.repeat(self.req_indices, self.query_lens)

    def slot_mapping(self, block_table: np.ndarray, block_size: int) -> np.ndarray:
        """KV-cache slot of each row. [num_rows] int64

        `block_table`: [max_num_reqs, max_blocks_per_req] physical block ids.
        """
        blocks = block_table[self.row_req_indices, self.positions // block_size]
        slots: np.ndarray = blocks.astype(np.int64) * block_size
        slots += self.positions % block_size
        return slots
