"""Channel-wise bounds of the keys of each page, kept up to date as tokens arrive (Quest, arXiv 2406.10774)."""

from __future__ import annotations

import torch


class PageBounds:
    """Lowest and highest key [B,G,P,D] of each page of `page_tokens` slots; slots arrive in order and stay."""

    def __init__(self, page_tokens: int):
        self.page_tokens = page_tokens
        self.num_slots = 0
        self._bounds: torch.Tensor | None = None  # [2,B,G,P,D]: lowest, then highest

    @property
    def nbytes(self) -> int:
        return 0 if self._bounds is None else self._bounds.untyped_storage().nbytes()

    @property
    def read_bytes(self) -> int:
        """Bytes of the bounds that a query is compared with, of all rows and heads."""
        return 2 * self.lowest.numel() * self.lowest.itemsize

    @property
    def lowest(self) -> torch.Tensor:
        assert self._bounds is not None
        return self._bounds[0, :, :, : self.num_pages]

    @property
    def highest(self) -> torch.Tensor:
        assert self._bounds is not None
        return self._bounds[1, :, :, : self.num_pages]

    @property
    def num_pages(self) -> int:
        return -(-self.num_slots // self.page_tokens)

    def append(self, keys: torch.Tensor, is_token: torch.Tensor | None) -> None:
        """Take in keys [B,G,T,D] of the next T slots; `is_token` bool [B,G,T] marks padding, None for none."""
        keys = keys.detach()
        T, low, high = keys.shape[2], keys, keys
        if is_token is not None:
            low = keys.masked_fill(~is_token[..., None], _most(keys))
            high = keys.masked_fill(~is_token[..., None], -_most(keys))
        self._grow(-(-(self.num_slots + T) // self.page_tokens), keys)
        assert self._bounds is not None
        done = 0
        while done < T:  # what a broken page has room for, all whole pages at once, and what is left
            page, slot = divmod(self.num_slots, self.page_tokens)
            whole = 0 if slot else (T - done) // self.page_tokens
            end = done + (whole * self.page_tokens or min(T - done, self.page_tokens - slot))
            pages = (max(1, whole), -1)
            lowest, highest = self._bounds[:, :, :, page : page + pages[0]].unbind(0)
            lowest.copy_(lowest.minimum(low[:, :, done:end].unflatten(2, pages).amin(3)))
            highest.copy_(highest.maximum(high[:, :, done:end].unflatten(2, pages).amax(3)))
            self.num_slots += end - done
            done = end

    def rewind(self, keys: torch.Tensor, is_token: torch.Tensor | None, num_slots: int) -> None:
        """Go back to `num_slots` slots, given the keys [B,G,T,D] that remain in the last, broken page."""
        self.num_slots = num_slots - keys.shape[2]
        assert self.num_slots % self.page_tokens == 0 and self._bounds is not None
        self._bounds[0, :, :, self.num_pages :] = _most(self._bounds)
        self._bounds[1, :, :, self.num_pages :] = -_most(self._bounds)
        if keys.shape[2]:
            self.append(keys, is_token)

    def put(self, bounds: torch.Tensor, num_slots: int) -> None:
        """Hold these bounds [2,B,G,P,D] of the pages of `num_slots` slots, in place of anything else."""
        self._bounds, self.num_slots = None, num_slots
        self._grow(bounds.shape[3], bounds[0])
        assert self._bounds is not None
        self._bounds[:, :, :, : bounds.shape[3]] = bounds

    def select_rows(self, rows: torch.Tensor) -> None:
        if self._bounds is not None:
            self._bounds = self._bounds.index_select(1, rows)

    def _grow(self, pages: int, keys: torch.Tensor) -> None:
        held = 0 if self._bounds is None else self._bounds.shape[3]
        if pages <= held:
            return
        B, G, _, D = keys.shape
        grown = keys.new_empty(2, B, G, pages + pages // 32, D)
        grown[0], grown[1] = _most(keys), -_most(keys)
        if self._bounds is not None:
            grown[:, :, :, :held] = self._bounds
        self._bounds = grown


def _most(x: torch.Tensor) -> float:
    """Bound of an empty page: finite, so that a query's zero does not turn it into NaN."""
    return torch.finfo(x.dtype).max
