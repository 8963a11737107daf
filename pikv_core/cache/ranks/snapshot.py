"""What ranks hold of one cache, put together as one process would hold it; and a rank's part of that.

Shapes: B batch, G key/value heads, S stored slots, U units, P pages, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pikv_core.cache.ranks.by_shards import ByShards
from pikv_core.cache.ranks.shard_pages import own_pages, whole_pages
from pikv_core.cache.ranks.split import Heads, Split, TokenTurns
from pikv_core.cache.snapshot import Snapshot
from pikv_core.cache.store import EMPTY, Slots
from pikv_core.observation import WHOLE


def join(parts: Sequence[Snapshot], split: str) -> Snapshot:
    """Return what all ranks hold, given what each does; `split` is how (see `pikv_core.cache.ranks`)."""
    first = parts[0]
    layers = [_join_layers(facts, split) for facts in zip(*(part.facts["layers"] for part in parts))]
    peak = sum(part.facts["peak_bytes"] for part in parts)
    events = [event for part in parts for event in part.facts["events"]]
    whole = Snapshot({**first.facts, "layers": layers, "peak_bytes": peak, "events": events})
    names = dict.fromkeys(name for part in parts for name in part.slots)
    slots = {name: [part.slots[name] for part in parts if name in part.slots] for name in names}
    whole.growing = {**first.growing}
    if split == TokenTurns.name:
        whole.small = {**first.small}
        whole.slots = {name: _in_order(held) for name, held in slots.items()}
        return whole
    if split == ByShards.name:
        whole.small = {**first.small}
        whole.slots = whole_pages(whole, parts)
        return whole
    whole.slots = {name: _side_by_side(held) for name, held in slots.items()}
    of_heads = _of_heads(first)
    for name, x in first.small.items():
        held = [part.small[name] for part in parts]
        if name in of_heads:
            whole.small[name] = torch.cat(held, dim=1)
            if name.endswith(".head"):
                whole.small[name] = torch.arange(whole.small[name].shape[1]).expand(len(x), -1)
        else:
            whole.small[name] = x
    for name, x in first.growing.items():
        whole.growing[name] = torch.cat([part.growing[name] for part in parts], dim=2) if name != "tokens" else x
    return whole


def part_of(whole: Snapshot, split: Split, num_ranks: int) -> Snapshot:
    """Return this rank's part of what a cache holds."""
    layers = [facts and {**facts, "dimensions": _part_of_dimensions(facts, split)} for facts in whole.facts["layers"]]
    facts = {**whole.facts, "layers": layers, "peak_bytes": whole.facts["peak_bytes"] // num_ranks}
    if isinstance(split, TokenTurns):
        slots = {name: _turns_of(held, split) for name, held in whole.slots.items()}
        return Snapshot(facts, whole.small, slots, whole.growing)
    if isinstance(split, ByShards):
        return Snapshot(facts, whole.small, own_pages(whole, split.own_shards), whole.growing)
    part = Snapshot(facts)
    part.slots = {name: _picked(held, split.own_heads) for name, held in whole.slots.items()}
    of_heads = _of_heads(whole)
    for name, x in whole.small.items():
        part.small[name] = split.own_heads(x) if name in of_heads else x
        if name.endswith(".head"):
            part.small[name] = torch.arange(part.small[name].shape[1]).expand(len(x), -1)
    for name, x in whole.growing.items():
        part.growing[name] = x if name == "tokens" else split.own_heads(x, dim=2)
    return part


def _of_heads(found: Snapshot) -> set[str]:
    """Name the small tensors that have the heads of a layer as their second dimension (see `Policy.heads_apart`)."""
    remembered = [item for facts in found.facts["layers"] if facts for item in facts["own"]["items"]]
    whole = {memory.get("tensor") for key, memory in remembered if key.startswith(WHOLE)}
    return {name for name, x in found.small.items() if name.startswith("layers.") and x.dim() > 1 and name not in whole}


def _join_layers(facts: Sequence[Any], split: str) -> Any:
    if facts[0] is None:
        return None
    B, G, D = facts[0]["dimensions"]
    lanes = []
    for each in zip(*(one["lanes"] for one in facts), strict=True):
        flags = {
            "has_empty": any(lane["has_empty"] for lane in each),
            "in_order": split == TokenTurns.name or all(lane["in_order"] for lane in each),
        }
        lanes.append({**each[0], **flags})
    heads = sum(one["dimensions"][1] for one in facts) if split == Heads.name else G
    return {**facts[0], "dimensions": [B, heads, D], "lanes": lanes}


def _part_of_dimensions(facts: dict[str, Any], split: Split) -> list[int]:
    B, G, D = facts["dimensions"]
    return [B, G // split.parts_of_heads, D]


def _side_by_side(parts: Sequence[Slots]) -> Slots:
    """Return the heads of several stores as one store's; who has fewer slots gets empty ones."""
    unit, longest = parts[0].unit, max(part.columns["position"].shape[2] for part in parts)

    def joined(held: list[torch.Tensor], rows: int, fill: int) -> torch.Tensor:
        full = [x if x.shape[2] == rows else _padded(x, rows, fill) for x in held]
        return torch.cat(full, dim=1)

    codes = {name: joined([part.codes[name] for part in parts], longest // unit, 0) for name in parts[0].codes}
    columns = {
        name: joined([part.columns[name] for part in parts], longest, EMPTY if name == "position" else 0)
        for name in parts[0].columns
    }
    return Slots(unit, parts[0].dtype, codes, columns)


def _padded(x: torch.Tensor, rows: int, fill: int) -> torch.Tensor:
    whole = x.new_full((*x.shape[:2], rows, *x.shape[3:]), fill)
    whole[:, :, : x.shape[2]] = x
    return whole


def _in_order(parts: Sequence[Slots]) -> Slots:
    """Return the units of several stores, whose heads hold the same tokens, as one store's in order of position."""
    unit = parts[0].unit
    position = torch.cat([part.columns["position"][0, 0] for part in parts])
    order = position.unflatten(0, (-1, unit))[:, 0].argsort()
    codes = {name: torch.cat([part.codes[name] for part in parts], dim=2) for name in parts[0].codes}
    columns = {name: torch.cat([part.columns[name] for part in parts], dim=2) for name in parts[0].columns}
    return _units(Slots(unit, parts[0].dtype, codes, columns), order)


def _turns_of(whole: Slots, split: TokenTurns) -> Slots:
    """Return the units of a store that are this rank's; without padding, a token's position is its column."""
    first = whole.columns["position"][0, 0].unflatten(0, (-1, whole.unit))[:, 0]
    return _units(whole, split.turns.among(first).nonzero()[:, 0])


def _units(slots: Slots, units: torch.Tensor) -> Slots:
    columns = {
        name: x.unflatten(2, (-1, slots.unit)).index_select(2, units).flatten(2) for name, x in slots.columns.items()
    }
    return Slots(slots.unit, slots.dtype, {n: x.index_select(2, units) for n, x in slots.codes.items()}, columns)


def _picked(slots: Slots, pick: Callable[[torch.Tensor], torch.Tensor]) -> Slots:
    codes, columns = ({name: pick(x) for name, x in held.items()} for held in (slots.codes, slots.columns))
    return Slots(slots.unit, slots.dtype, codes, columns)
