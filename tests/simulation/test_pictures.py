"""Every picture is drawn, without a warning, from much, from one point and from nothing."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pikv_core.simulation import pictures
from pikv_core.simulation.diagnostics import Histogram, HitsOverTime, Reuse


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def size(file: Path) -> tuple[int, int]:
    """Return the pixels of a PNG."""
    head = file.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:])
    return width, height


def reuse(distances: Histogram, times: Histogram) -> Reuse:
    return Reuse(9, 4, 0.5, distances, times, 0)


def over_time(*ratios: float | None) -> HitsOverTime:
    count = len(ratios)
    return HitsOverTime([float(place) for place in range(count)], 1.0, [1] * count, [1] * count, [0] * count, [*ratios])


def rows(policies: int, capacities: list[int]) -> list[dict[str, Any]]:
    return [
        {"policy": f"policy {number}", "capacity_blocks": capacity, "block_hit_ratio": number / policies}
        for number in range(policies)
        for capacity in capacities
    ]


def curve(num_blocks: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"capacity_blocks": np.arange(num_blocks + 1), "block_hit_ratio": np.linspace(0, 1, num_blocks + 1)}


@pytest.mark.parametrize("policies", [1, 20])
@pytest.mark.parametrize("capacities", [[1], [7, 1, 10**15]])
@pytest.mark.parametrize("num_blocks", [None, 0, 5000])
def test_hit_ratios(tmp_path: Path, policies: int, capacities: list[int], num_blocks: int | None) -> None:
    lru = {} if num_blocks is None else curve(num_blocks)
    pictures.draw_hit_ratios(rows(policies, capacities), lru, 0.0, tmp_path / "a.png")
    assert min(size(tmp_path / "a.png")) > 300


@pytest.mark.parametrize(
    "histogram", [Histogram([], []), Histogram([1.0, 2.0], [3]), Histogram([2.0**-10, 1.0, 2.0**64], [0, 10**12])]
)
def test_reuse(tmp_path: Path, histogram: Histogram) -> None:
    pictures.draw_reuse(reuse(histogram, histogram), tmp_path / "a.png")
    assert min(size(tmp_path / "a.png")) > 300


@pytest.mark.parametrize("ratios", [(None,), (0.5,), (0.0, None, 1.0), (None, None)])
def test_over_time(tmp_path: Path, ratios: tuple[float | None, ...]) -> None:
    pictures.draw_over_time({"lru": over_time(*ratios), "fifo": over_time(0.2)}, "title", tmp_path / "a.png")
    assert min(size(tmp_path / "a.png")) > 300


@pytest.mark.parametrize("slo_s", [None, 2.0])
@pytest.mark.parametrize("times", [[0.0], [0.0, 0.0], [3.5], [0.0, 1e-9, 5e20], [0.1, 0.2, 0.3]])
def test_times_to_first_token(tmp_path: Path, times: list[float], slo_s: float | None) -> None:
    drawn = {"no cache": np.array(times), "lru": np.zeros(len(times))}
    pictures.draw_ttft(drawn, slo_s, "title", tmp_path / "a.png")
    assert min(size(tmp_path / "a.png")) > 300


@pytest.mark.parametrize("names", [["hbm"], ["hbm", "dram", "ssd"]])
def test_tiers(tmp_path: Path, names: list[str]) -> None:
    told = [{"tier": name, "block_hits": 0, "bytes_read": 0, "bytes_written": 10**15} for name in names]
    pictures.draw_tiers(told, tmp_path / "a.png")
    assert min(size(tmp_path / "a.png")) > 300


def test_a_picture_that_cannot_be_drawn_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), pictures.picture(tmp_path / "a.png"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
