"""The pages of shards, of which each rank stores some, put together in a snapshot as one process stores them, and taken
apart again.

Shapes: B batch, G key/value heads, P pages, S slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pikv_core.cache.shards.shards import NONE, STATE, OwnShards
from pikv_core.cache.snapshot import Snapshot, unpacked
from pikv_core.cache.store import EMPTY, Slots


def whole_pages(known: Snapshot, parts: Sequence[Snapshot]) -> dict[str, Slots]:
    """Return the slots of all stores, given what each rank holds; known: what all ranks know."""
    slots = {**parts[0].slots}
    for name, shard, num_shards in _bodies(known):
        held = [part.slots.get(name) for part in parts]
        places = [OwnShards(rank, len(parts)).places(shard, num_shards) for rank in range(len(parts))]
        page_tokens = max(
            x.columns["position"].shape[2] // (int(at.max()) + 1)
            for x, at in zip(held, places)
            if x and int(at.max()) >= 0
        )
        slots[name] = _picked(held, places, page_tokens)
    return slots


def own_pages(whole: Snapshot, own: OwnShards) -> dict[str, Slots]:
    """Return the slots of all stores that one rank holds."""
    slots = {**whole.slots}
    for name, shard, num_shards in _bodies(whole):
        at = own.places(shard, num_shards)
        num_pages = int((at >= 0).sum(-1).max())
        from_page = (at < 0).int().argsort(dim=-1, stable=True)[..., :num_pages]  # own pages first, in their order
        is_own = at.gather(2, from_page) >= 0
        held = whole.slots[name]
        page_tokens = held.columns["position"].shape[2] // shard.shape[2]
        slots[name] = _picked([held], [from_page.masked_fill(~is_own, NONE)], page_tokens)
    return slots


def _bodies(known: Snapshot) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield the name of each store of shards, the shard [B,G,P] of each page, and how many shards there are."""
    for index, facts in enumerate(known.facts["layers"]):
        state = {} if facts is None else unpacked(facts["own"], known.small, torch.device("cpu")).get(STATE)
        if state and state["shard_of_page"].shape[2]:
            yield f"layers.{index}.lanes.0.body", state["shard_of_page"], state["count"].shape[2]


def _picked(held: Sequence[Slots | None], places: Sequence[torch.Tensor], page_tokens: int) -> Slots:
    """Return a store of P pages, of which each is that at its place [B,G,P] in one of the stores held, or empty."""
    first = next(slots for slots in held if slots is not None)

    def picked(kind: str, name: str, fill: int) -> torch.Tensor:
        like: torch.Tensor = getattr(first, kind)[name]
        B, G, P = places[0].shape
        whole = like.new_full((B, G, P, page_tokens, *like.shape[3:]), fill)
        for slots, at in zip(held, places, strict=True):
            if slots is not None:
                x: torch.Tensor = getattr(slots, kind)[name]
                by_page = x.unflatten(2, (x.shape[2] // page_tokens, page_tokens))
                b, g, p = (at >= 0).nonzero(as_tuple=True)
                whole[b, g, p] = by_page[b, g, at[b, g, p]]
        return whole.flatten(2, 3)

    codes = {name: picked("codes", name, 0) for name in first.codes}
    columns = {name: picked("columns", name, EMPTY if name == "position" else 0) for name in first.columns}
    return Slots(first.unit, first.dtype, codes, columns)
