"""Numbering ids: the table against a dict, in pieces, through growth, for keys that lie badly."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from pikv_core.simulation.factorize import FIRST_BITS, Numbering, factorize

KEYS = {
    "few": np.arange(300_000) % 7,
    "all new, past two growths": np.arange(3 << FIRST_BITS) * -3,
    "high bits alone": (np.arange(100_000) % 40_000) << 47,
    "both ends of int64": np.array([2**63 - 1, -(2**63), 0, -1, 2**63 - 1, 0, -(2**63)]),
    "random": np.random.default_rng(0).integers(-(2**63), 2**63, 5000).repeat(3),
    "none": np.zeros(0, np.int64),
}


def by_dict(raw: NDArray[np.int64]) -> list[int]:
    seen: dict[int, int] = {}
    return [seen.setdefault(key, len(seen)) for key in raw.tolist()]


@pytest.mark.parametrize("keys", KEYS)
def test_compiled_table_is_a_dict(keys: str) -> None:
    raw = KEYS[keys].astype(np.int64)
    table = Numbering(small=0)
    numbers = table.number(raw)
    assert numbers.dtype == np.int32
    assert numbers.tolist() == by_dict(raw)
    assert table.count == np.unique(raw).size


@pytest.mark.parametrize("backend", ["numba", "python"])
def test_twins_agree_in_pieces_and_through_growth(backend: Literal["numba", "python"]) -> None:
    raw = np.random.default_rng(1).integers(0, 60_000, 90_000)
    numbering = Numbering(backend, small=1000)
    pieces = np.split(raw, [10, 900, 900, 5000, 80_000])
    assert np.concatenate([numbering.number(piece) for piece in pieces]).tolist() == by_dict(raw)
    assert numbering.count == np.unique(raw).size > 1 << (FIRST_BITS - 1)


def test_factorize() -> None:
    numbers, count = factorize(np.array([9, -4, 9, 7], np.int64))
    assert (numbers.tolist(), count) == ([0, 1, 0, 2], 3)
