"""Dropping what is over budget: single tokens from a plain store, whole units from an encoded one.

Shapes: B batch, G key/value heads, S stored slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pikv_core.cache.store import EMPTY, Store
from pikv_core.scheduling.base import Evictor, Tokens


class Dropped(NamedTuple):
    """What an eviction did to the slots: whether any moved, and whether any was left empty."""

    moved: bool
    emptied: bool


def evict(
    stores: list[Store],
    evictor: Evictor | None,
    num_seen: torch.Tensor,
    capacity: torch.Tensor,
    window: int | None,
) -> Dropped:
    """Drop the tokens of the lowest score until every head holds its row's `capacity` [B], or a unit more.

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
    if uneven:
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        surplus = rank >= capacity.to(score.device)[:, None, None]
        score = score.masked_fill(surplus, -torch.inf)
        position = position.masked_fill(surplus, EMPTY)
        for store, part in zip(stores, position.split([store.num_slots for store in stores], dim=2)):
            store.position.copy_(part)
    if over <= 0:
        return Dropped(False, uneven)
    first = stores[0]
    if first.unit > 1:
        _drop_units(first, score[:, :, : first.num_slots], over)
    elif over == 1:
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


def _drop_units(store: Store, score: torch.Tensor, over: int) -> None:
    """Drop whole units, those whose tokens have the lowest mean score, as many as fit into `over`."""
    held = store.num_slots // store.unit
    drop = min(over // store.unit, held)
    if drop == 0:
        return
    gone = score == -torch.inf
    total = score.masked_fill(gone, 0.0).unflatten(2, (held, store.unit)).sum(dim=-1)
    present = (~gone).unflatten(2, (held, store.unit)).sum(dim=-1)
    mean = (total / present.clamp(min=1)).masked_fill(present == 0, -torch.inf)
    store.keep(mean.topk(held - drop, dim=-1).indices.sort(dim=-1).values)
