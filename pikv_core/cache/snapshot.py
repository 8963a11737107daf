"""All that a cache holds between two steps, as named tensors and plain facts; and a cache that goes on from it.

Shapes: B batch, G key/value heads, S stored slots, U units, P pages, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pikv_core.cache.cache import PiKVCache
from pikv_core.cache.lane import Lane
from pikv_core.cache.layer import CacheLayer
from pikv_core.cache.store import Slots
from pikv_core.errors import PiKVError

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass
class Snapshot:
    """What a cache holds. facts: JSON values; small: tensors that change as a whole; slots: of every store, by name.

    growing: tensors that get longer in their last dimension but one, of whose rows only the last can still change:
    bounds [2,B,G,P,D] of pages. Tensors may be views of the cache's own.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    small: dict[str, torch.Tensor] = field(default_factory=dict)
    slots: dict[str, Slots] = field(default_factory=dict)
    growing: dict[str, torch.Tensor] = field(default_factory=dict)


def take(cache: PiKVCache) -> Snapshot:
    """Return what a cache holds, without copying; raise PiKVError while it is held."""
    found = Snapshot(facts={"peak_bytes": cache.peak_bytes, "layers": []})
    found.facts["shared"] = _packed(cache.own_layers[0].run.shared, found.small, "shared")
    found.facts["events"] = list(cache.events)
    for layer in cache.own_layers:
        if layer.held:
            raise PiKVError("a cache that is held has no state to save", hint="call cache.compress() before")
        found.facts["layers"].append(_take_layer(layer, found) if layer.is_initialized else None)
    return found


def restore(cache: PiKVCache, found: Snapshot, device: torch.device) -> None:
    """Make an empty cache, of the same recipe and model, hold what a snapshot says."""
    for layer, facts in zip(cache.own_layers, found.facts["layers"], strict=True):
        if facts is not None:
            _restore_layer(layer, facts, found, device)
    cache.own_layers[0].run.shared.update(unpacked(found.facts["shared"], found.small, device))
    cache.events[:] = found.facts["events"]
    for layer in cache.own_layers:
        if layer.is_initialized:
            layer.place_pages()
        layer.note_bytes()
    cache.peak_bytes = max(cache.peak_bytes, found.facts["peak_bytes"])


def _take_layer(layer: CacheLayer, found: Snapshot) -> dict[str, Any]:
    name = f"layers.{layer.index}"
    found.small[f"{name}.num_seen"] = layer.num_seen
    if layer.budgets.head_share is not None:
        found.small[f"{name}.head_share"] = layer.budgets.head_share
    B, G, D = layer.dimensions
    return {
        "dimensions": [B, G, D],
        "dtype": str(layer.dtype).removeprefix("torch."),
        "seen_length": layer.seen_length,
        "scoring": layer.scoring,
        "own": _packed(layer.run.own, found.small, f"{name}.own"),
        "lanes": [_take_lane(lane, found, f"{name}.lanes.{number}") for number, lane in enumerate(layer.lanes)],
    }


def _take_lane(lane: Lane, found: Snapshot, name: str) -> dict[str, Any]:
    if lane.pairs is not None:
        found.small[f"{name}.pairs"] = lane.pairs
    found.small[f"{name}.head"] = lane.head
    for part, store in (("tail", lane.tail), ("body", lane.body)):
        if store is not None and store.has_arrived:
            found.slots[f"{name}.{part}"] = store.slots()
    facts: dict[str, Any] = {"has_empty": lane.has_empty, "in_order": lane.in_order}
    if lane.bounds is not None and lane.bounds.num_slots:
        facts["bounded_slots"] = lane.bounds.num_slots
        found.growing[f"{name}.bounds"] = torch.stack([lane.bounds.lowest, lane.bounds.highest])
    return facts


def _restore_layer(layer: CacheLayer, facts: Mapping[str, Any], found: Snapshot, device: torch.device) -> None:
    name = f"layers.{layer.index}"
    B, G, D = facts["dimensions"]
    nothing = torch.empty(B, G, 0, D, dtype=DTYPES[facts["dtype"]], device=device)
    layer.lazy_initialization(nothing, nothing)
    layer.seen.set(found.small[f"{name}.num_seen"])
    layer.budgets.head_share = found.small.get(f"{name}.head_share")
    layer.seen_length = facts["seen_length"]
    layer.run.own.update(unpacked(facts["own"], found.small, device))
    layer.lanes = []
    for number, about in enumerate(facts["lanes"]):
        prefix = f"{name}.lanes.{number}"
        lane = Lane(layer.plan, found.small.get(f"{prefix}.pairs"), found.small[f"{prefix}.head"])
        lane.has_empty, lane.in_order = about["has_empty"], about["in_order"]
        lane.set_columns(facts["scoring"])
        for part, store in (("tail", lane.tail), ("body", lane.body)):
            if store is not None and f"{prefix}.{part}" in found.slots:
                store.put(found.slots[f"{prefix}.{part}"].to(device))
        if lane.bounds is not None and f"{prefix}.bounds" in found.growing:
            lane.bounds.put(found.growing[f"{prefix}.bounds"].to(device), about["bounded_slots"])
        layer.lanes.append(lane)
    layer.set_scoring(facts["scoring"])


def _packed(memory: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Return what a member remembers as JSON values, its tensors put aside by name."""
    if isinstance(memory, dict):
        parts = enumerate(memory.items())
        return {"items": [[key, _packed(value, tensors, f"{name}.{number}")] for number, (key, value) in parts]}
    if isinstance(memory, torch.Tensor):
        tensors[name] = memory
        return {"tensor": name}
    return {"value": memory}


def unpacked(packed: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    """Return what a member remembers."""
    if "items" in packed:
        return {key: unpacked(value, tensors, device) for key, value in packed["items"]}
    if "tensor" in packed:
        return tensors[packed["tensor"]].to(device)
    return packed["value"]
