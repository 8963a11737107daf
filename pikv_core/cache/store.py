"""A store: tokens of one layer under one codec, with the columns that travel with them.

Shapes: B batch, G key/value heads, T new tokens, S stored slots, U units, D head dim, N query rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pikv_core.compression.base import Codec
from pikv_core.compression.none import Plain
from pikv_kernels.attend_tokens import attend_alone
from pikv_kernels.partial_attention import Partial

if TYPE_CHECKING:
    from pikv_core.cache.rotary import Rotary

EMPTY = -1  # the position of a slot that holds no token


@dataclass(frozen=True)
class Slots:
    """What a store holds: codes [B,G,U,...] of units of `unit` tokens, columns [B,G,S] with `position` among them."""

    unit: int
    dtype: torch.dtype  # of the model's keys
    codes: dict[str, torch.Tensor]
    columns: dict[str, torch.Tensor]

    def to(self, device: torch.device) -> Slots:
        """Return the same on a device."""
        codes, columns = ({name: x.to(device) for name, x in part.items()} for part in (self.codes, self.columns))
        return Slots(self.unit, self.dtype, codes, columns)


class Store:
    """Hold tokens in units of the codec; memory grows in small chunks and shrinks with what is dropped.

    columns: names of the float32 statistics kept with each token, beside its int32 `position` (EMPTY: no token).
    grain_slots: slots are allocated in multiples of it.
    """

    def __init__(self, codec: Codec, columns: tuple[str, ...] = (), grain_slots: int = 8):
        self.codec = codec
        self.unit = codec.unit_tokens
        self.num_slots = 0
        self._away_slots = 0  # of the first ones, whose codes lie elsewhere
        self._grain = grain_slots
        self._column_names = columns
        self._encoded: dict[str, torch.Tensor] = {}
        self._columns: dict[str, torch.Tensor] = {}
        self._nbytes: int | None = None  # counted anew after tensors are replaced
        self._dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of everything held, spare room included."""
        if self._nbytes is None:
            self._nbytes = sum(tensor.untyped_storage().nbytes() for tensor in self._all())
        return self._nbytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of the keys and values of one slot, as they are stored."""
        codes = self._encoded.values()
        return sum(x[0, 0, :1].numel() * x.itemsize for x in codes) // self.unit

    @property
    def num_heads(self) -> int:
        return self._columns["position"].shape[1]

    @property
    def position(self) -> torch.Tensor:
        """True positions [B,G,S], int32."""
        return self._columns["position"].narrow(2, 0, self.num_slots)

    def columns(self) -> dict[str, torch.Tensor]:
        """Views [B,G,S] of the statistics, writable."""
        return {name: self._columns[name].narrow(2, 0, self.num_slots) for name in self._column_names}

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B,G,S,D] in the model's dtype."""
        return self.codec.decode(self._encoded_until(self.num_slots), self.position, self._dtype)

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        position: torch.Tensor,
        columns: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Encode and add T tokens, a multiple of the unit: keys, values [B,G,T,D], position and columns [B,G,T].

        Columns that are not given start at 0.
        """
        T = keys.shape[2]
        assert T % self.unit == 0
        self._dtype = keys.dtype
        new_columns = {"position": position if self._columns else position.to(torch.int32)}
        for name in self._column_names:
            given = (columns or {}).get(name)
            new_columns[name] = keys.new_zeros(keys.shape[:3], dtype=torch.float32) if given is None else given
        self._write(self._columns, new_columns, self.num_slots, 1)
        here = (self.num_slots - self._away_slots) // self.unit
        self._write(self._encoded, self.codec.encode(keys, values, position), here, self.unit)
        self.num_slots += T

    def overwrite(self, slot: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        """Put tokens into slots [B,G,T] that are there, none where EMPTY (units of one token only)."""
        assert self.unit == 1
        is_put = slot >= 0
        head = torch.arange(slot[..., 0].numel(), device=slot.device).view(*slot.shape[:2], 1)
        new = {**self.codec.encode(keys, values, position), "position": position}
        for name, x in new.items():
            held = self._columns[name] if name == "position" else self._encoded[name]
            at = (head * held.shape[2] + slot)[is_put]
            held.view(-1, *held.shape[3:])[at] = x[is_put].to(held.dtype)

    def keep(self, units: torch.Tensor) -> None:
        """Keep only these units [B,G,K] of every head, in the given order, and free the rest."""
        slots = units if self.unit == 1 else self._slots_of(units)
        for tensors, rows in ((self._columns, slots), (self._encoded, units)):
            for name in tensors:  # one after the other, so that no second copy of all is ever held
                tensors[name] = _take(tensors[name], rows)
        self.num_slots, self._nbytes = slots.shape[2], None

    def drop_one(self, slot: torch.Tensor) -> None:
        """Drop one slot [B,G] of every head: the last slot's token takes its place (units of one token only)."""
        assert self.unit == 1
        last = self.num_slots - 1
        places: dict[torch.Size, torch.Tensor] = {}
        for x in self._all():
            inner = x.shape[3:]
            if inner not in places:
                places[inner] = slot.view(*slot.shape, 1, *[1] * len(inner)).expand(*slot.shape, 1, *inner)
            x.scatter_(2, places[inner], x.narrow(2, last, 1).clone())
        self.num_slots = last

    def drop_newest_slots(self, num_slots: int) -> None:
        """Forget the last slots; what they held must be nothing that is still wanted."""
        assert num_slots % self.unit == 0
        self.num_slots -= num_slots

    def select_rows(self, rows: torch.Tensor) -> None:
        """Reorder or repeat the batch."""
        self._columns = {name: x.index_select(0, rows) for name, x in self._columns.items()}
        self._encoded = {name: x.index_select(0, rows) for name, x in self._encoded.items()}
        self._nbytes = None

    @property
    def has_room(self) -> bool:
        """Whether one more token fits without new storage."""
        return self.num_slots < self._columns["position"].shape[2]

    def pages(self, pages: torch.Tensor, page_tokens: int) -> Store:
        """Return a store with only these pages [B,G,K] of `page_tokens` slots each, in page order of the slots.

        Of a page -1, which is none, the slots are empty.
        """
        assert page_tokens % self.unit == 0
        is_none = (pages < 0).repeat_interleave(page_tokens, dim=2)
        pages = pages.clamp(min=0)
        picked = Store(self.codec)
        picked._dtype = self._dtype
        per_page = page_tokens // self.unit
        picked._encoded = {name: _take_pages(x, pages, per_page) for name, x in self._encoded.items()}
        position = _take_pages(self._columns["position"], pages, page_tokens)
        slots = (pages[..., None] * page_tokens + torch.arange(page_tokens, device=pages.device)).flatten(2)
        picked._columns = {"position": position.masked_fill(is_none | (slots >= self.num_slots), EMPTY)}
        picked.num_slots = position.shape[2]
        return picked

    def plain(self) -> Store:
        """Return the same tokens decoded, for many attentions in a row; this very store where nothing is encoded."""
        if isinstance(self.codec, Plain):
            return self
        plain = Store(Plain())
        plain._dtype, plain.num_slots, plain._columns = self._dtype, self.num_slots, self._columns
        plain._encoded = Plain().encode(*self.decoded(), self.position)
        return plain

    def attend(
        self, query: torch.Tensor, visible: torch.Tensor | None, scale: float, softcap: float | None, with_probs: bool
    ) -> Partial:
        """Attend query [B,G,N,D] over the first S slots of `visible` [B,1|G,1|N,S], None for all slots held."""
        S = self.num_slots if visible is None else visible.shape[-1]
        position = self.position[:, :, :S]
        return self.codec.attend(query, self._encoded_until(S), position, visible, scale, softcap, with_probs)

    def attend_pages(
        self,
        query: torch.Tensor,
        visible: torch.Tensor | None,
        pages: torch.Tensor,
        page_tokens: int,
        scale: float,
        softcap: float | None,
    ) -> Partial:
        """Attend query [B,G,R,D] over pages [B,G,K] alone; they are copied where the codec cannot pick them."""
        encoded = self._encoded_until(self.num_slots)
        part = self.codec.attend_pages(query, encoded, pages, page_tokens, visible, scale, softcap)
        if part is not None:
            return part
        picked = self.pages(pages, page_tokens)
        return picked.attend(query, (picked.position >= 0)[:, :, None], scale, softcap, False)

    def attend_alone(
        self,
        query: torch.Tensor,
        visible: torch.Tensor | None,
        pages: torch.Tensor | None,
        page_tokens: int,
        scale: float,
    ) -> torch.Tensor:
        """Return the output [B,G,R,D] of one new token that sees some of these slots, and of no other store."""
        if pages is not None:
            return self.attend_pages(query, visible, pages, page_tokens, scale, None).output
        if isinstance(self.codec, Plain):
            held = self._encoded_until(self.num_slots)
            return attend_alone(query, held["keys"], held["values"], visible, scale)
        return self.attend(query, visible, scale, None, False).output

    def shifted(self, rotary: Rotary, offset: torch.Tensor, layer: int) -> Store:
        """Return the same tokens decoded, their keys rotated by `offset` [B,G,S] positions."""
        keys, values = self.decoded()
        moved = Store(Plain())
        moved._dtype, moved.num_slots = self._dtype, self.num_slots
        moved._columns = {"position": self.position}
        moved._encoded = {"keys": rotary.shift(keys, offset, layer), "values": values}
        return moved

    @property
    def has_arrived(self) -> bool:
        """Whether there ever was a token, so that its memory has a shape."""
        return bool(self._columns)

    def slots(self) -> Slots:
        """Return views of all that is held."""
        columns = {name: x[:, :, : self.num_slots] for name, x in self._columns.items()}
        return Slots(self.unit, self._dtype, self._encoded_until(self.num_slots), columns)

    def put(self, slots: Slots) -> None:
        """Hold what `slots` says, in place of anything else."""
        self._columns, self._encoded, self._dtype = {}, {}, slots.dtype
        self._write(self._columns, slots.columns, 0, 1)
        self._write(self._encoded, slots.codes, 0, self.unit)
        self.num_slots = slots.columns["position"].shape[2]

    def set_columns(self, names: tuple[str, ...]) -> None:
        """Carry these statistics from now on: new ones start at 0, others are freed."""
        self._column_names = names
        if "position" in self._columns:
            position = self._columns["position"]
            held = {name: x for name, x in self._columns.items() if name in names or name == "position"}
            added = {name: torch.zeros_like(position, dtype=torch.float32) for name in names if name not in held}
            self._columns = {**held, **added}
            self._nbytes = None

    def part(self, pairs: torch.Tensor, codec: Codec) -> Store:
        """Return a copy with only these (row, head) pairs [N], row·G + head, as N rows of one head."""
        taken = Store(codec, self._column_names, self._grain)
        taken._dtype, taken.num_slots = self._dtype, self.num_slots
        taken._columns = {name: _pairs(x, pairs) for name, x in self._columns.items()}
        taken._encoded = {name: _pairs(x, pairs) for name, x in self._encoded.items()}
        return taken

    def _encoded_until(self, num_slots: int) -> dict[str, torch.Tensor]:
        assert num_slots % self.unit == 0
        return {name: x.narrow(2, 0, num_slots // self.unit) for name, x in self._encoded.items()}

    def _all(self) -> list[torch.Tensor]:
        return [*self._encoded.values(), *self._columns.values()]

    def _slots_of(self, units: torch.Tensor) -> torch.Tensor:
        return (units[..., None] * self.unit + torch.arange(self.unit, device=units.device)).flatten(2)

    def _write(self, tensors: dict[str, torch.Tensor], new: dict[str, torch.Tensor], used: int, unit: int) -> None:
        """Write new rows behind the `used` ones of each tensor, growing it where the room is short."""
        for name, x in new.items():
            rows = used + x.shape[2]
            held = tensors.get(name)
            if held is None or held.shape[2] < rows:
                room = self._room(rows * unit) // unit
                dtype = x.dtype if held is None else held.dtype
                grown = x.new_empty(*x.shape[:2], room, *x.shape[3:], dtype=dtype)
                grown[:, :, rows:] = 0  # not whatever was there: a masked slot still multiplies its value by 0
                if held is not None:
                    grown[:, :, :used] = held[:, :, :used]
                tensors[name] = held = grown
                self._nbytes = None
            held.narrow(2, used, x.shape[2]).copy_(x)

    def _room(self, num_slots: int) -> int:
        """Slots to allocate for `num_slots`: up to the next page, with 1 % to grow."""
        grain = max(self._grain, self.unit)
        spare = num_slots // 100 if self.num_slots else 0
        return -(-(num_slots + spare) // grain) * grain


def _take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gather rows [B,G,K] of x [B,G,R,...] into a tensor of its own, by one flat index."""
    B, G, R = x.shape[:3]
    heads = torch.arange(B * G, device=x.device).view(B, G, 1) * R
    flat = x.view(B * G * R, *x.shape[3:])
    return flat.index_select(0, (heads + rows).flatten()).view(B, G, rows.shape[2], *x.shape[3:])


def _pairs(x: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).index_select(0, pairs)[:, None]


def _take_pages(x: torch.Tensor, pages: torch.Tensor, per_page: int) -> torch.Tensor:
    """Gather pages [B,G,K] of `per_page` rows each from x [B,G,R,...], R a multiple of it, by one flat index."""
    B, G, R = x.shape[:3]
    heads = torch.arange(B * G, device=x.device).view(B, G, 1) * (R // per_page)
    flat = x.view(B * G * (R // per_page), per_page, *x.shape[3:])
    return flat.index_select(0, (heads + pages).flatten()).view(B, G, -1, *x.shape[3:])
