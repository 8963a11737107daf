"""The pages that a layer's last query read, kept on the device: the next one brings only those it lacks.

Shapes: B batch, G key/value heads, K pages that are read, N slots of pages, S stored slots, U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pikv_core.cache.tiers.pages import Layout, SlowPages


class PageCache:
    """Hold N pages of each head, and behind them the newest page, which is still growing."""

    def __init__(self, page_tokens: int):
        self._page_tokens = page_tokens
        self._held = torch.empty(0)  # int64 [B,G,N] on the CPU: the page in each slot, -1 for none
        self._flat: torch.Tensor | None = None
        self.encoded: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return 0 if self._flat is None else self._flat.untyped_storage().nbytes()

    def bring(
        self, pages: torch.Tensor, newest: Mapping[str, torch.Tensor], slow: SlowPages, num_slots: int, unit: int
    ) -> tuple[torch.Tensor, dict[str, int]]:
        """Have pages [B,G,K] in slots, which are returned in their order, and the bytes that came by tier.

        newest: the codes of what lies behind the slow pages.
        """
        wanted = pages.cpu()
        B, G, _ = wanted.shape
        per_page, last = slow.page_units, (num_slots - 1) // self._page_tokens
        self._make_room(newest, wanted.shape, per_page)
        N = self._held.shape[2]
        match = wanted[..., None] == self._held[:, :, None]
        slot, is_last = match.int().argmax(-1), wanted == last
        missing = ~match.any(-1) & ~is_last
        used = torch.zeros(B, G, N + 1, dtype=torch.bool)
        used.scatter_(2, torch.where(missing | is_last, N, slot), True)
        free = used[..., :N].int().argsort(dim=-1, stable=True)
        slot = torch.where(missing, free.gather(2, (missing.cumsum(-1) - 1).clamp(min=0)), slot)
        slot = slot.masked_fill(is_last, N)
        row, head, at = missing.nonzero(as_tuple=True)
        page, own = wanted[row, head, at], slot[row, head, at]
        self._held[row, head, own] = page
        by_head, is_slow = row * G + head, page < slow.num_pages
        moved = {}
        if bool(is_slow.any()):
            moved = slow.bring_each(by_head[is_slow], page[is_slow], own[is_slow], self.encoded)
        first, num_units = slow.num_pages * per_page, num_slots // unit
        units = torch.arange(per_page)
        near, to = (x[~is_slow][:, None] * per_page + units for x in (page, own))
        place = by_head[~is_slow][:, None]
        newest_units = num_units - last * per_page
        for name, x in newest.items():
            target = self.encoded[name]
            if len(near):
                target.flatten(0, 1)[place, to] = x.flatten(0, 1)[place, near - first]
            here = last * per_page - first
            target[:, :, N * per_page : N * per_page + newest_units] = x[:, :, here : here + newest_units]
        return slot.to(pages.device), moved

    def of_slots(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B,G,N'] for the slots here of what x [B,1|G,S] tells of those stored; anything for empty ones."""
        last, token = (x.shape[2] - 1) // self._page_tokens, torch.arange(self._page_tokens)
        held = torch.cat([self._held, torch.full_like(self._held[:, :, :1], last)], dim=2)
        index = (held[..., None] * self._page_tokens + token).flatten(2).clamp(0, x.shape[2] - 1)
        return x.expand(-1, index.shape[1], -1).gather(2, index.to(x.device))

    def num_slots(self, stored_slots: int) -> int:
        """Return how many slots there are here up to the newest one of those stored."""
        return self._held.shape[2] * self._page_tokens + (stored_slots - 1) % self._page_tokens + 1

    def __deepcopy__(self, memo: dict[int, Any]) -> PageCache:
        return PageCache(self._page_tokens)

    def _make_room(self, newest: Mapping[str, torch.Tensor], shape: torch.Size, per_page: int) -> None:
        """Have slots for K pages, those in use where they were."""
        B, G, K = shape
        before, held = self.encoded, self._held
        if held.dim() == 3 and held.shape[2] >= K:
            return
        N, layout = K + 1, Layout.of(newest)
        self._flat = next(iter(newest.values())).new_empty(layout.num_bytes((N + 1) * per_page), dtype=torch.uint8)
        self.encoded = layout.views(self._flat, (N + 1) * per_page)
        self._held = torch.full((B, G, N), -1)
        for x in self.encoded.values():
            x.zero_()  # an empty slot still multiplies its value by 0
        for name, x in before.items():
            self.encoded[name][:, :, : held.shape[2] * per_page] = x[:, :, : held.shape[2] * per_page]
        if before:
            self._held[:, :, : held.shape[2]] = held
