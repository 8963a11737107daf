"""A store whose oldest pages lie in tiers behind the device, and are read through staging buffers.

Positions of all tokens stay on the device, and so do the codes of the newest. Where a whole layer fits a buffer, the
newest are put behind the staged ones and attended with them by the kernel that attends in memory: the same output to
the bit. Else pieces are attended one by one and merged by log-sum-exp.

Shapes: B batch, G key/value heads, R query rows of a head's group, S stored slots, K pages that are read, U units.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from pikv_core.cache.store import Slots, Store
from pikv_core.cache.tiers.page_cache import PageCache
from pikv_core.cache.tiers.pages import Layout, SlowPages
from pikv_core.cache.tiers.transfers import Piece
from pikv_core.compression.base import Codec
from pikv_core.errors import PiKVError
from pikv_kernels.merge_partials import join_partials
from pikv_kernels.partial_attention import Partial

if TYPE_CHECKING:
    from pikv_core.cache.tiers.tiers import Tiers


class TieredStore(Store):
    """Hold the newest tokens on the device, older pages in tiers.

    selects: whether queries read single pages, those that are chosen for them.
    """

    def __init__(
        self, codec: Codec, columns: tuple[str, ...], grain_slots: int, tiers: Tiers, layer: int, selects: bool
    ):
        super().__init__(codec, columns, grain_slots)
        self.tiers, self.layer = tiers, layer
        self.page_tokens = grain_slots if selects else math.lcm(tiers.limits.page_tokens, codec.unit_tokens)
        self.slow = SlowPages(self.page_tokens // codec.unit_tokens)
        self._cache = PageCache(self.page_tokens)
        self._reads_pages = selects
        self._version = self._room_units = 0
        tiers.stores[layer] = self

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.slow.nbytes + self._cache.nbytes

    @property
    def streams(self) -> bool:
        """Whether every step reads all pages."""
        return self.slow.num_pages > 0 and not self._reads_pages

    @property
    def whole_bytes(self) -> int:
        """Bytes of a buffer that takes all pages, and the newest tokens behind them."""
        assert self.slow.layout is not None
        return self.slow.layout.num_bytes(self._room_units)

    def pieces(self) -> list[Piece]:
        """Return what a step reads, in order."""
        num_pages, per_page = self.slow.num_pages, self.slow.page_units
        if self.tiers.reads_whole:
            return [Piece(self.layer, self._version, 0, num_pages, self._room_units)]
        assert self.slow.layout is not None
        page_bytes = self.slow.layout.num_bytes(per_page)
        at_once = self.tiers.transfers.buffers[0].numel() // page_bytes
        if at_once < 1:
            raise PiKVError(
                f"a staging buffer of {self.tiers.transfers.buffers[0].numel():,} bytes is too small for a page of "
                f"{self.page_tokens} tokens, {page_bytes:,} bytes",
                hint="raise cache.tiers.staging or cache.tiers.device, or lower cache.tiers.page_tokens",
            )
        ends = [*range(at_once, num_pages, at_once), num_pages]
        return [
            Piece(self.layer, self._version, first, end, (end - first) * per_page)
            for first, end in zip([0, *ends], ends)
        ]

    def bring(self, piece: Piece, buffer: torch.Tensor) -> dict[str, int]:
        """Copy a piece into a buffer; return the bytes by tier."""
        assert self.slow.layout is not None
        return self.slow.bring(piece.first, piece.end, self.slow.layout.views(buffer, piece.num_units))

    def place(self, beside_bytes: int, read_pages: int) -> None:
        """Move the oldest pages to their tiers, as far as shares and the device's limit ask for.

        beside_bytes: that the layer holds on the device for these tokens beside this store. read_pages: that a query
        reads where pages are chosen.
        """
        if self.num_slots:
            self.slow.layout = self.slow.layout or Layout.of(self._encoded)
            by_share = int(self.tiers.slow_share * self.num_slots + 1e-6) // self.page_tokens
            wanted = max(by_share, self._pages_over(beside_bytes, read_pages))  # a function of their number alone
            num_pages = min(wanted, (self.num_slots - 1) // self.page_tokens) - self.slow.num_pages
            if num_pages > 0:
                self._move(num_pages)
            self._make_room()
        self.tiers.settled(self.layer)

    def _make_room(self) -> None:
        """Count buffers as long enough for a page of tokens more."""
        self._room_units = (self.num_slots // self.page_tokens + 2) * self.slow.page_units

    def _begin(self) -> None:
        """Have buffers for all pages, and for what has come while the cache was held behind them."""
        if self.num_slots > self._room_units * self.unit:
            self._make_room()
            self.tiers.has_buffers = False
        self.tiers.begin(self.layer)

    def _pages_over(self, beside_bytes: int, read_pages: int) -> int:
        """Return how many pages the device's limit has no room for."""
        page, (B, G, total) = self.page_tokens, self.position.shape
        given = self.tiers.layer_bytes(B * G)
        if given is None:
            return 0
        assert self.slow.layout is not None
        slot_bytes = self.slow.layout.num_bytes(self.slow.page_units) / page
        positions = 4 * B * G * (1.01 * total + self._grain)
        chosen = (read_pages + 3) * page * slot_bytes if self._reads_pages else 0
        room = int((given - beside_bytes - positions - chosen) / slot_bytes / 1.01) - self._grain - page
        if room < 1:
            limit = self.tiers.limits.device or 0
            raise PiKVError(
                f"a device limit of {limit:,} bytes has no room for the newest {page} tokens of {total} in each layer, "
                f"beside {self.tiers.staging_limit or 0:,} bytes of staging and what tells of the other tokens",
                hint="raise cache.tiers.device, or give a smaller cache.tiers.staging or page_tokens",
            )
        return max(0, -(-(total - room) // page))

    def _move(self, num_pages: int) -> None:
        """Move the next pages to tiers."""
        first = 0
        for tier, count in self.tiers.deal(self, num_pages):
            start, end = time.perf_counter(), first + count * self.slow.page_units
            part = {name: x[:, :, first:end].detach() for name, x in self._encoded.items()}
            num_bytes = self.slow.append(part, tier, self.tiers.limit_of(tier))
            self.tiers.transfers.totals.wrote(tier.name, num_bytes, time.perf_counter() - start)
            first = end
        held = (self.num_slots - self._away_slots) // self.unit
        for name in self._encoded:  # one after the other, so that no second copy of all is ever held
            self._encoded[name] = self._encoded[name][:, :, first:held].clone()
        self._away_slots += first * self.unit
        self._nbytes = None
        self._version += 1

    def attend(
        self, query: torch.Tensor, visible: torch.Tensor | None, scale: float, softcap: float | None, with_probs: bool
    ) -> Partial:
        parts, start = [], 0
        for part in self._parts():
            end = start + part.num_slots
            seen = None if visible is None else visible[..., start:end]
            parts.append(part.attend(query, seen, scale, softcap, with_probs))
            start = end
        return join_partials(parts)

    def attend_alone(
        self,
        query: torch.Tensor,
        visible: torch.Tensor | None,
        pages: torch.Tensor | None,
        page_tokens: int,
        scale: float,
    ) -> torch.Tensor:
        if pages is not None:
            return self.attend_pages(query, visible, pages, page_tokens, scale, None).output
        self._reads_pages = False
        if self.slow.num_pages:
            self._begin()
            if not self.tiers.reads_whole:
                return self.attend(query, visible, scale, None, False).output
        (output,) = [part.attend_alone(query, visible, None, 0, scale) for part in self._parts()]
        return output

    def attend_pages(
        self,
        query: torch.Tensor,
        visible: torch.Tensor | None,
        pages: torch.Tensor,
        page_tokens: int,
        scale: float,
        softcap: float | None,
    ) -> Partial:
        self._reads_pages = True
        if not self.slow.num_pages:
            return super().attend_pages(query, visible, pages, page_tokens, scale, softcap)
        assert page_tokens == self.page_tokens
        start = time.perf_counter()
        newest = self._encoded_until(self.num_slots - self._away_slots)
        slots, moved = self._cache.bring(pages, newest, self.slow, self.num_slots, self.unit)
        if query.is_cuda:
            torch.cuda.current_stream(query.device).synchronize()
        if moved:
            spent = time.perf_counter() - start
            self.tiers.transfers.totals.read(moved, spent, spent)
        num_slots = self._cache.num_slots(self.num_slots)
        staged = self._view(self._cache.encoded, self._cache.of_slots(self.position), num_slots)
        seen = None if visible is None else self._cache.of_slots(visible.flatten(2))[:, :, None, :num_slots]
        return staged.attend_pages(query, seen, slots, page_tokens, scale, softcap)

    def pages(self, pages: torch.Tensor, page_tokens: int) -> Store:
        return self.whole().pages(pages, page_tokens)

    def plain(self) -> Store:
        return self.whole().plain()

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.whole().decoded()

    def slots(self) -> Slots:
        whole = self.whole(torch.device("cpu")).slots()
        return Slots(whole.unit, whole.dtype, whole.codes, {name: x.cpu() for name, x in whole.columns.items()})

    def put(self, slots: Slots) -> None:
        self._forget_pages()
        super().put(slots)

    def drop_newest_slots(self, num_slots: int) -> None:
        super().drop_newest_slots(num_slots)
        assert self.num_slots >= self._away_slots
        self._cache = PageCache(self.page_tokens)

    def select_rows(self, rows: torch.Tensor) -> None:
        self.tiers.transfers.forget()
        self.tiers.has_buffers = False
        super().select_rows(rows)
        self.slow.select_rows(rows.cpu())
        self._cache = PageCache(self.page_tokens)
        self._version += 1

    def whole(self, device: torch.device | None = None) -> Store:
        """Return all tokens in one store, on the device for as long as it is used, or on another one."""
        position = self._columns["position"]
        if not self.slow.num_pages:
            return self._view(self._encoded, position, self.num_slots)
        layout, num_units = Layout.of(self._encoded), self.num_slots // self.unit
        room = -(-num_units // self.slow.page_units) * self.slow.page_units
        flat = torch.empty(layout.num_bytes(room), dtype=torch.uint8, device=device or position.device)
        encoded = layout.views(flat, room)
        start = time.perf_counter()
        moved = self.slow.bring(0, self.slow.num_pages, encoded)
        spent = time.perf_counter() - start
        self.tiers.transfers.totals.read(moved, spent, spent)
        self._put_behind(encoded)
        for x in encoded.values():
            x[:, :, num_units:] = 0
        if flat.device == position.device:
            self.tiers.note_device(flat.numel())
        return self._view(encoded, position, self.num_slots)

    def _parts(self) -> Iterator[Store]:
        """Yield stores that hold all tokens together, older ones first; each until the next is asked for."""
        self._reads_pages = False
        if not self.slow.num_pages:
            yield self.whole()
            return
        assert self.slow.layout is not None
        self._begin()
        is_whole = self.tiers.reads_whole
        for piece in self.pieces():
            with self.tiers.transfers.reading(piece) as buffer:
                encoded = self.slow.layout.views(buffer, piece.num_units)
                first, end = piece.first * self.page_tokens, piece.end * self.page_tokens
                if is_whole:
                    self._put_behind(encoded)
                    end = self.num_slots
                yield self._view(encoded, self.position[:, :, first:end], end - first)
        if not is_whole:
            yield self._view(self._encoded, self.position[:, :, self._away_slots :], self.num_slots - self._away_slots)

    def _put_behind(self, encoded: dict[str, torch.Tensor]) -> None:
        """Copy the newest tokens' codes behind those of the pages."""
        first, end = self._away_slots // self.unit, self.num_slots // self.unit
        for name, x in self._encoded_until(self.num_slots - self._away_slots).items():
            encoded[name][:, :, first:end].copy_(x)

    def _view(self, encoded: dict[str, torch.Tensor], position: torch.Tensor, num_slots: int) -> Store:
        """Return a store of the first slots of what lies in other memory."""
        view = Store(self.codec)
        view._dtype, view.num_slots = self._dtype, num_slots
        view._encoded, view._columns = encoded, {"position": position}
        return view

    def _forget_pages(self) -> None:
        self.tiers.transfers.forget()
        self.slow, self._cache = SlowPages(self.slow.page_units), PageCache(self.page_tokens)
        self._away_slots = 0
        self._version += 1
