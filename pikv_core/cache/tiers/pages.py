"""Pages of a store that lie behind the device: which extent of which tier holds each, and how they come back.

Shapes: B batch, G key/value heads, U units, P pages, D head dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pikv_core.cache.tiers.memory import Tier

GRAIN_BYTES = 64  # that tensors begin at a multiple of
MOST_PAGES = 64  # that are allocated at a time while single pages arrive, and a sixteenth of those that are there


@dataclass(frozen=True)
class Layout:
    """How units lie in flat memory: for each encoded tensor its shape [B,G,·,...] and its dtype."""

    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    @staticmethod
    def of(encoded: Mapping[str, torch.Tensor]) -> Layout:
        return Layout({name: ((*x.shape[:2], *x.shape[3:]), x.dtype) for name, x in encoded.items()})

    def num_bytes(self, num_units: int) -> int:
        """Return the bytes of so many units, those between the tensors included."""
        return sum(_rounded(math.prod(shape) * num_units * dtype.itemsize) for shape, dtype in self.shapes.values())

    def views(self, flat: torch.Tensor, num_units: int) -> dict[str, torch.Tensor]:
        """Return tensors [B,G,U,...] that lie one behind the other in uint8 memory."""
        views, start = {}, 0
        for name, ((B, G, *inner), dtype) in self.shapes.items():
            own = B * G * math.prod(inner) * num_units * dtype.itemsize
            views[name] = flat[start : start + own].view(dtype).view(B, G, num_units, *inner)
            start += _rounded(own)
        return views


class Extent:
    """Memory of a tier for up to `room` pages of a store, filled from the front."""

    def __init__(self, tier: Tier, layout: Layout, room: int, page_units: int):
        self.tier, self.room, self.used = tier, room, 0
        self._layout, self._page_units = layout, page_units
        self._flat = tier.allocate(layout.num_bytes(room * page_units))
        self.tensors = layout.views(self._flat, room * page_units)

    @property
    def nbytes(self) -> int:
        return self._flat.untyped_storage().nbytes()

    def copy(self, rows: torch.Tensor | None = None) -> Extent:
        """Return the same in memory of its own; rows: of the batch, None for all as they are."""
        layout = self._layout
        if rows is not None:
            layout = Layout({name: ((len(rows), *shape[1:]), dtype) for name, (shape, dtype) in layout.shapes.items()})
        made = Extent(self.tier, layout, self.room, self._page_units)
        made.used = self.used
        for name, x in self.tensors.items():
            made.tensors[name].copy_(x if rows is None else x.index_select(0, rows))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Extent:
        return self.copy()


class SlowPages:
    """Pages of `page_units` units each, in the order of their tokens; none ever moves or changes."""

    def __init__(self, page_units: int):
        self.page_units = page_units
        self.layout: Layout | None = None
        self.extents: list[Extent] = []
        self._places: list[tuple[int, int]] = []  # of each page: its extent, and which of its pages

    @property
    def num_pages(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)

    def nbytes_in(self, tier: Tier) -> int:
        return sum(extent.nbytes for extent in self.extents if extent.tier is tier)

    def num_pages_in(self, tier: Tier) -> int:
        return sum(extent.used for extent in self.extents if extent.tier is tier)

    def room_in(self, tier: Tier, limit_bytes: int) -> int:
        """Return how many more pages a tier may take of this store under a limit."""
        open_room = sum(extent.room - extent.used for extent in self.extents if extent.tier is tier)
        return open_room + self._affordable(tier, limit_bytes)

    def _affordable(self, tier: Tier, limit_bytes: int) -> int:
        """Return how many pages may still be allocated."""
        assert self.layout is not None
        return max(0, limit_bytes - self.nbytes_in(tier)) // self.layout.num_bytes(self.page_units)

    def append(self, encoded: Mapping[str, torch.Tensor], tier: Tier, limit_bytes: int | None) -> int:
        """Take in whole pages [B,G,U,...] behind the others, into a tier under a limit; return the bytes written."""
        num_pages = next(iter(encoded.values())).shape[2] // self.page_units
        assert self.layout is not None
        written = done = 0
        while done < num_pages:
            index = next((i for i, x in enumerate(self.extents) if x.tier is tier and x.used < x.room), None)
            if index is None:
                grain = min(MOST_PAGES, self.num_pages // 16)
                if limit_bytes is not None:
                    grain = min(grain, self._affordable(tier, limit_bytes))
                room = max(num_pages - done, grain)
                self.extents.append(Extent(tier, self.layout, room, self.page_units))
                index = len(self.extents) - 1
            extent = self.extents[index]
            count = min(num_pages - done, extent.room - extent.used)
            here, there = (self._units(first, count) for first in (done, extent.used))
            for name, x in encoded.items():
                part = x[:, :, here]
                extent.tensors[name][:, :, there].copy_(part)
                written += part.numel() * part.itemsize
            self._places += [(index, extent.used + page) for page in range(count)]
            extent.used += count
            done += count
        return written

    def bring(self, first: int, end: int, into: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Copy the pages from `first` to `end` to the front of tensors [B,G,U,...]; return the bytes by tier."""
        moved: dict[Tier, tuple[int, float]] = {}
        for index, place, at, count in self._runs(first, end):
            extent, start = self.extents[index], time.perf_counter()
            here, there = self._units(place, count), self._units(at, count)
            num_bytes = 0
            for name, x in extent.tensors.items():
                num_bytes += _copy_units(into[name][:, :, there], x[:, :, here])
            before = moved.get(extent.tier, (0, 0.0))
            moved[extent.tier] = (before[0] + num_bytes, before[1] + time.perf_counter() - start)
        for tier, (num_bytes, spent_s) in moved.items():
            tier.wait(num_bytes, spent_s)
        return {tier.name: num_bytes for tier, (num_bytes, _) in moved.items()}

    def bring_each(
        self, head: torch.Tensor, page: torch.Tensor, slot: torch.Tensor, into: Mapping[str, torch.Tensor]
    ) -> dict[str, int]:
        """Copy page [N] of row·G + head [N] to slot [N] of tensors [B,G,U,...]; return the bytes by tier."""
        moved: dict[str, int] = {}
        places = torch.tensor(self._places)[page]
        for index in places[:, 0].unique().tolist():
            extent, own = self.extents[index], places[:, 0] == index
            start, num_bytes = time.perf_counter(), 0
            for name, x in extent.tensors.items():
                rows = _by_page(x, self.page_units)
                taken = rows.index_select(0, head[own] * extent.room + places[own, 1])
                target = _by_page(into[name], self.page_units)
                num_slots = into[name].shape[2] // self.page_units
                target.index_copy_(0, (head[own] * num_slots + slot[own]).to(target.device), taken.to(target.device))
                num_bytes += taken.numel() * taken.itemsize
            extent.tier.wait(num_bytes, time.perf_counter() - start)
            moved[extent.tier.name] = moved.get(extent.tier.name, 0) + num_bytes
        return moved

    def select_rows(self, rows: torch.Tensor) -> None:
        """Reorder, repeat or drop rows of the batch, in new memory of the same tiers."""
        if not self.extents:
            return
        for index, extent in enumerate(self.extents):
            self.extents[index] = extent.copy(rows)
        self.layout = Layout.of(self.extents[0].tensors)

    def _units(self, first_page: int, num_pages: int) -> slice:
        return slice(first_page * self.page_units, (first_page + num_pages) * self.page_units)

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield extent, its first page, where that comes to lie, and how many follow it side by side."""
        at = first
        while at < end:
            index, place = self._places[at]
            count = 1
            while at + count < end and self._places[at + count] == (index, place + count):
                count += 1
            yield index, place, at - first, count
            at += count


def _copy_units(target: torch.Tensor, source: torch.Tensor) -> int:
    """Copy [B,G,U,...], on a GPU without a detour by rows that are dense on both sides; return the bytes."""
    if target.is_cuda:
        for to_row, from_row in zip(target, source):
            for to_head, from_head in zip(to_row, from_row):
                to_head.copy_(from_head, non_blocking=True)
    else:
        target.copy_(source)
    return source.numel() * source.itemsize


def _by_page(x: torch.Tensor, page_units: int) -> torch.Tensor:
    """Return [B·G·P,page_units,...] of dense [B,G,U,...]."""
    return x.view(-1, page_units, *x.shape[3:])


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // GRAIN_BYTES) * GRAIN_BYTES
