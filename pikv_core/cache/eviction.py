"""Dropping what is over budget: single tokens from a plain store, whole units from an encoded one.

Shapes: B batch, G key/value heads, S stored slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pikv_core.cache.store import EMPTY, Store
from pikv_core.scheduling.base import Evictor, Tokens


class Dropped(NamedTuple):
    """What an eviction did: whether the heads' slots still agree is lost (`moved`), whether any was left empty."""

    moved: bool
    emptied: bool


def evict(
    stores: list[Store],
    evictor: Evictor | None,
    num_seen: torch.Tensor,
    capacity: torch.Tensor,
    window: int | None,
) -> Dropped:
    """Drop the tokens of the lowest score until every head holds its row's `capacity` [B]; of codes, whole units.

    stores: the layer's, encoded ones first. num_seen [B]: tokens of each row's sequence. window: tokens beyond it
    go first. Without an evictor the oldest go. Both tensors are on the CPU.
    """
    most = int(capacity.max())
    uneven = bool((capacity != most).any())
    over = sum(store.num_slots for store in stores) - most
    if over <= 0 and not uneven:
        return Dropped(False, False)
    position = torch.cat([store.position for store in stores], dim=2)
    score = _score(stores, position, evictor, num_seen, capacity, window)
    first = stores[0]
    if first.unit > 1:
        return _drop_units(first, score, capacity.to(score.device))
    if uneven:
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        surplus = rank >= capacity.to(score.device)[:, None, None]
        score = score.masked_fill(surplus, -torch.inf)
        position = position.masked_fill(surplus, EMPTY)
        for store, part in zip(stores, position.split([store.num_slots for store in stores], dim=2)):
            store.position.copy_(part)
    if over <= 0:
        return Dropped(uneven, uneven)
    if over == 1:
        first.drop_one(score.argmin(dim=-1))
    else:
        first.keep(score.topk(most, dim=-1).indices.sort(dim=-1).values)
    return Dropped(True, uneven)


def _score(
    stores: list[Store],
    position: torch.Tensor,
    evictor: Evictor | None,
    num_seen: torch.Tensor,
    capacity: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """Return the evictor's scores [B,G,S], -inf for empty slots and what has left the window."""
    seen = num_seen.to(position.device)
    if evictor is None:
        score = position.float()
    else:
        columns = {name: torch.cat([store.columns()[name] for store in stores], dim=2) for name in evictor.columns}
        score = evictor.score(Tokens(position, columns, seen, capacity.to(position.device)))
    gone = position < 0
    if window is not None:
        gone = gone | (position < (seen - window + 1)[:, None, None])
    return score.masked_fill(gone, -torch.inf)


def _drop_units(store: Store, score: torch.Tensor, capacity: torch.Tensor) -> Dropped:
    """Drop the units whose tokens have the lowest mean score, as many as leave each row's `capacity` [B].

    score: [B,G,S] of all stores, this one first. Where rows may drop unequally many, the rest is left empty in place.
    """
    alive = score > -torch.inf
    spare = alive.sum(dim=-1) - capacity[:, None]
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
