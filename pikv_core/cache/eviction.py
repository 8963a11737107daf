"""Dropping what is over budget: single tokens from a plain store, whole units from an encoded one.

Shapes: B batch, G key/value heads, S stored slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pikv_core.cache.store import EMPTY, Store


class Room(NamedTuple):
    """How many tokens each head of a lane may hold: `capacity` [B,G] beside them, the least and the most of it."""

    capacity: torch.Tensor
    least: int
    most: int

    @property
    def is_uneven(self) -> bool:
        return self.least != self.most


class Dropped(NamedTuple):
    """What an eviction did: whether the heads' slots still agree is lost (`moved`), whether any was left empty."""

    moved: bool
    emptied: bool


def evict(stores: list[Store], score: torch.Tensor, room: Room) -> Dropped:
    """Drop the tokens of the lowest score until every head has room for what it holds; of codes, whole units.

    stores: the lane's, encoded ones first. score: [B,G,S] of all stores together, -inf for what goes first.
    """
    uneven, most = room.is_uneven, room.most
    over = sum(store.num_slots for store in stores) - most
    first = stores[0]
    if first.unit > 1:
        return _drop_units(first, score, room.capacity)
    if uneven:
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        surplus = rank >= room.capacity[..., None]
        score = score.masked_fill(surplus, -torch.inf)
        position = torch.cat([store.position for store in stores], dim=2).masked_fill(surplus, EMPTY)
        for store, part in zip(stores, position.split([store.num_slots for store in stores], dim=2)):
            store.position.copy_(part)
    if over <= 0:
        return Dropped(uneven, uneven)
    assert len(stores) == 1
    if over == 1:
        first.drop_one(score.argmin(dim=-1))
    else:
        first.keep(score.topk(most, dim=-1).indices.sort(dim=-1).values)
    return Dropped(True, uneven)


def _drop_units(store: Store, score: torch.Tensor, capacity: torch.Tensor) -> Dropped:
    """Drop the units whose tokens have the lowest mean score, as many as leave each head's `capacity` [B,G].

    score: [B,G,S] of all stores, this one first. Where heads may drop unequally many, the rest is left empty in place.
    """
    alive = score > -torch.inf
    spare = alive.sum(dim=-1) - capacity
    units = (store.num_slots // store.unit, store.unit)
    present = alive[:, :, : store.num_slots].unflatten(2, units).sum(dim=-1)
    total = score.masked_fill(~alive, 0.0)[:, :, : store.num_slots].unflatten(2, units).sum(dim=-1)
    mean = (total / present.clamp(min=1)).masked_fill(present == 0, -torch.inf)
    worst_first = mean.argsort(dim=-1, stable=True)
    goes = present.gather(2, worst_first).cumsum(dim=-1) <= spare[..., None]
    goes &= mean.gather(2, worst_first) < torch.inf  # never what the evictor must keep
    drop = int(goes.sum(dim=-1).min())
    emptied = bool(goes[..., drop:].any())
    if emptied:
        gone = torch.zeros_like(goes).scatter_(2, worst_first, goes).repeat_interleave(store.unit, dim=2)
        store.position.masked_fill_(gone, EMPTY)
    if drop:
        store.keep(worst_first[..., drop:].sort(dim=-1).values)
    return Dropped(bool(drop) or emptied, emptied)
