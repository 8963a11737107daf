"""What a press measures of the caches that it compresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import QuantizedCache


@dataclass(frozen=True)
class LayerStats:
    """One layer after a prompt: tokens over rows and heads, padding apart, and bytes of live storage.

    full_bytes: before anything was dropped. Bytes are None where the cache is quantised by a library of its own.
    """

    seen_tokens: int
    kept_tokens: int
    resident_bytes: int | None
    full_bytes: int | None


def stored_bytes(cache: Any, layer: int) -> int | None:
    """Return the bytes of the storage of a layer's keys and values, None for a quantised cache."""
    if isinstance(cache, QuantizedCache):
        return None
    held: list[torch.Tensor] = [cache.layers[layer].keys, cache.layers[layer].values]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    return sum(storages.values())


def summary(layers: Mapping[int, LayerStats]) -> dict[str, Any]:
    """Return the sums over layers, and each layer's own as `layer_stats`."""
    by_layer = {index: asdict(stats) for index, stats in sorted(layers.items())}
    sums: dict[str, Any] = {}
    for name in ("seen_tokens", "kept_tokens", "resident_bytes", "full_bytes"):
        values = [stats[name] for stats in by_layer.values()]
        sums[name] = None if None in values else sum(values)
    return {**sums, "layer_stats": by_layer}
