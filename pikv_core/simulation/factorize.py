"""Number distinct ids from 0 on in the order of first sight: an open-addressing hash table, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.compiled import compiled

SMALL = 20_000  # distinct ids and new ones up to which a dict is quicker than loading what is compiled
FIRST_BITS = 16  # slots of the first table, as a power of two
MULTIPLIER = -7046029254386353131  # 2**64 / golden ratio, odd, as int64: spreads the keys over the high bits (Knuth)


def factorize(raw: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
    """Return the number of each id [A] and how many distinct ones there are."""
    numbering = Numbering()
    return numbering.number(raw), numbering.count


class Numbering:
    """The numbers of the ids seen so far."""

    def __init__(self, backend: Literal["numba", "python"] = "numba", small: int = SMALL):
        self._backend = backend
        self._max_small = small
        self._small: dict[int, int] = {}
        self._bits = FIRST_BITS
        self._table: NDArray[np.int64] | None = None  # [slots, 2]: id, its number + 1; 0 for a free slot
        self._count = 0

    @property
    def count(self) -> int:
        return len(self._small) if self._table is None else self._count

    def number(self, raw: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the number of each id of one more piece; raw is contiguous."""
        if self._table is None:
            small = self._small
            if raw.size + len(small) <= self._max_small:
                return np.array([small.setdefault(known, len(small)) for known in raw.tolist()], np.int32)
            self._table = np.zeros((1 << self._bits, 2), np.int64)
            self._number(np.array(list(small), np.int64))
        return self._number(raw)

    def _number(self, raw: NDArray[np.int64]) -> NDArray[np.int32]:
        assert self._table is not None
        numbers = np.empty(raw.size, np.int32)
        fill, rehash = (_compiled_fill(), _compiled_rehash()) if self._backend == "numba" else (_fill, _rehash)
        done = 0
        with np.errstate(over="ignore"):
            while True:
                limit = 1 << (self._bits - 1)
                done, self._count = fill(raw, done, numbers, self._table, self._count, limit, 64 - self._bits)
                if done == raw.size:
                    return numbers
                self._bits += 1
                larger = np.zeros((1 << self._bits, 2), np.int64)
                rehash(self._table, larger, 64 - self._bits)
                self._table = larger


@cache
def _compiled_fill() -> Callable[..., tuple[int, int]]:
    return compiled(_fill, "factorize_fill")


@cache
def _compiled_rehash() -> Callable[..., None]:
    return compiled(_rehash, "factorize_rehash")


def _fill(raw: Any, first: int, numbers: Any, table: Any, count: int, limit: int, shift: int) -> tuple[int, int]:
    """Number the ids from `first` on until `limit` distinct ones are known; return how far it came and the count."""
    mask = table.shape[0] - 1
    for place in range(first, raw.size):
        key = raw[place]
        slot = ((key * MULTIPLIER) >> shift) & mask
        while table[slot, 1] != 0 and table[slot, 0] != key:
            slot = (slot + 1) & mask
        if table[slot, 1] == 0:
            if count == limit:
                return place, count
            count += 1
            table[slot, 0] = key
            table[slot, 1] = count
        numbers[place] = table[slot, 1] - 1
    return raw.size, count


def _rehash(table: Any, larger: Any, shift: int) -> None:
    mask = larger.shape[0] - 1
    for old in range(table.shape[0]):
        if table[old, 1] != 0:
            key = table[old, 0]
            slot = ((key * MULTIPLIER) >> shift) & mask
            while larger[slot, 1] != 0:
                slot = (slot + 1) & mask
            larger[slot, 0] = key
            larger[slot, 1] = table[old, 1]
