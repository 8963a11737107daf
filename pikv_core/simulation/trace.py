"""A trace of serving requests as columns; it knows neither policies nor bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.compiled import compiled
from pikv_core.simulation.factorize import factorize

ROOT = -1


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival and the blocks of their prompts; R requests, A accesses.

    A log of single objects has one access per request and `is_objects`: it has no prompts, so object hits alone mean
    something. A log of lengths has no accesses at all. Columns that tell nothing may be views of one value.
    """

    ids: NDArray[np.int32]  # [A] block of each access, 0 to num_blocks - 1, request by request in prefix order
    starts: NDArray[np.int64]  # [R + 1] request r is ids[starts[r]:starts[r + 1]]
    timestamps_ms: NDArray[np.float64]  # [R], from 0 on, never falling
    input_tokens: NDArray[np.int64]  # [R]
    output_tokens: NDArray[np.int64]  # [R]
    block_tokens: int
    num_blocks: int  # unique blocks
    category: NDArray[np.int16]  # [R] index into categories
    turn: NDArray[np.int32]  # [R] of its conversation, from 0
    parent: NDArray[np.int64]  # [R] request of the conversation's turn before, ROOT for none
    categories: tuple[str, ...] = ("all",)
    is_objects: bool = False

    @property
    def num_requests(self) -> int:
        return self.starts.size - 1

    @cached_property
    def blocks_per_request(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @cached_property
    def longest_request_blocks(self) -> int:
        return int(self.blocks_per_request.max(initial=0))

    @cached_property
    def next_accesses(self) -> NDArray[np.int32]:
        """Return, per access, the index of the next access to the same block; A where there is none. [A]"""
        following = np.empty(self.ids.size, np.int32)
        _compiled_next()(self.ids, np.full(self.num_blocks, self.ids.size, np.int32), following)
        return following

    @property
    def request_of_access(self) -> NDArray[np.int64]:
        """Return the request of each access. [A]"""
        return np.repeat(np.arange(self.num_requests), self.blocks_per_request)

    def without_partial_blocks(self) -> Trace:
        """Return the trace without the blocks that a prompt's end fills only in part."""
        full = np.minimum(self.blocks_per_request, self.input_tokens // self.block_tokens)
        keep = np.arange(self.ids.size) - self.starts[:-1][self.request_of_access] < full[self.request_of_access]
        starts = np.zeros_like(self.starts)
        np.cumsum(full, out=starts[1:])
        ids, num_blocks = dense(self.ids[keep])
        return dataclasses.replace(self, ids=ids, starts=starts, num_blocks=num_blocks)


def make_trace(
    requests: list[list[int]],
    block_tokens: int = 512,
    input_tokens: list[int] | None = None,
    timestamps_ms: list[float] | None = None,
    categories: list[str] | None = None,
) -> Trace:
    """Build a trace from the block ids of each request; without lengths, prompts fill their blocks.

    timestamps_ms: by default 0, 1, 2, ... categories: the name of each request's.
    """
    starts = np.zeros(len(requests) + 1, np.int64)
    np.cumsum([len(request) for request in requests], out=starts[1:])
    lengths = input_tokens or [block_tokens * len(request) for request in requests]
    names, category = np.unique(categories or ["all"] * len(requests), return_inverse=True)
    return columns(
        np.array([block for request in requests for block in request], np.int64),
        starts,
        np.array(timestamps_ms if timestamps_ms is not None else range(len(requests)), np.float64),
        np.array(lengths, np.int64),
        np.zeros(len(requests), np.int64),
        block_tokens,
        category=category.astype(np.int16),
        categories=tuple(str(name) for name in names),
    )


def columns(
    raw_ids: NDArray[np.int64],
    starts: NDArray[np.int64],
    timestamps_ms: NDArray[np.float64],
    input_tokens: NDArray[np.int64],
    output_tokens: NDArray[np.int64],
    block_tokens: int,
    **told: Any,
) -> Trace:
    """Return the trace with its block ids made dense; raw_ids: any int64, [A]; told: what else the log tells."""
    R = starts.size - 1
    untold = {
        "category": np.broadcast_to(np.int16(0), R),
        "turn": np.broadcast_to(np.int32(0), R),
        "parent": np.broadcast_to(np.int64(ROOT), R),
    }
    ids, num_blocks = dense(raw_ids)
    whole = {**untold, **told}
    return Trace(ids, starts, timestamps_ms, input_tokens, output_tokens, block_tokens, num_blocks, **whole)


def dense(raw_ids: NDArray[Any]) -> tuple[NDArray[np.int32], int]:
    """Number the distinct ids from 0 on, in order of first sight; return the numbers [A] and how many there are."""
    return factorize(np.ascontiguousarray(raw_ids, np.int64))


@cache
def _compiled_next() -> Callable[..., None]:
    return compiled(_next, "next_accesses")


def _next(ids: Any, later: Any, following: Any) -> None:
    for back in range(ids.size):
        access = ids.size - 1 - back
        following[access] = later[ids[access]]
        later[ids[access]] = access
