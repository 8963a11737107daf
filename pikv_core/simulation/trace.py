"""A trace of serving requests as columns; it knows neither policies nor bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival and the blocks of their prompts; R requests, A accesses."""

    ids: NDArray[np.int32]  # [A] block of each access, 0 to num_blocks - 1, request by request in prefix order
    starts: NDArray[np.int64]  # [R + 1] request r is ids[starts[r]:starts[r + 1]]
    timestamps_ms: NDArray[np.float64]  # [R]
    input_tokens: NDArray[np.int64]  # [R]
    output_tokens: NDArray[np.int64]  # [R]
    block_tokens: int
    num_blocks: int  # unique blocks

    @property
    def num_requests(self) -> int:
        return self.starts.size - 1

    @cached_property
    def blocks_per_request(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @cached_property
    def next_accesses(self) -> NDArray[np.int64]:
        """Return, per access, the index of the next access to the same block; A where there is none. [A]"""
        following = np.full(self.ids.size, self.ids.size, np.int64)
        order = np.argsort(self.ids, kind="stable")
        same = self.ids[order[:-1]] == self.ids[order[1:]]
        following[order[:-1][same]] = order[1:][same]
        return following


def make_trace(requests: list[list[int]], block_tokens: int = 512, input_tokens: list[int] | None = None) -> Trace:
    """Build a trace from the block ids of each request; without lengths, prompts fill their blocks."""
    starts = np.zeros(len(requests) + 1, np.int64)
    np.cumsum([len(request) for request in requests], out=starts[1:])
    lengths = input_tokens or [block_tokens * len(request) for request in requests]
    return columns(
        np.array([block for request in requests for block in request], np.int64),
        starts,
        np.arange(len(requests), dtype=np.float64),
        np.array(lengths, np.int64),
        np.zeros(len(requests), np.int64),
        block_tokens,
    )


def columns(
    raw_ids: NDArray[np.int64],
    starts: NDArray[np.int64],
    timestamps_ms: NDArray[np.float64],
    input_tokens: NDArray[np.int64],
    output_tokens: NDArray[np.int64],
    block_tokens: int,
) -> Trace:
    """Return the trace with its block ids made dense; raw_ids: any int64, [A]."""
    unique, dense = np.unique(raw_ids, return_inverse=True)
    ids = dense.astype(np.int32)
    return Trace(ids, starts, timestamps_ms, input_tokens, output_tokens, block_tokens, unique.size)
