"""How far a cache's attention outputs are from those of a full cache given the same queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch

from pikv_core.cache import PiKVCache
from pikv_core.cache.layer import CacheLayer


class AttentionError:
    """Run a full twin beside every layer of a cache and compare single-token steps; the cache's output goes on.

    The error of a layer is ‖output − full output‖ / ‖full output‖ over all steps, heads and rows; the mean over
    layers is `value`.
    """

    def __init__(self, cache: PiKVCache, config: Any):
        twin = PiKVCache(config)
        self._squares = torch.zeros(2, len(cache.own_layers), dtype=torch.float64)
        for index, (layer, full) in enumerate(zip(cache.own_layers, twin.own_layers)):
            layer.attend = self._beside(index, layer, full)  # type: ignore[method-assign]

    @property
    def value(self) -> float:
        """The relative error, 0 for a cache that loses nothing."""
        difference, size = self._squares
        return (difference / size).sqrt().mean().item()

    def _beside(self, index: int, layer: CacheLayer, full: CacheLayer) -> Any:
        attend = layer.attend

        def attend_both(query: torch.Tensor, *args: Any) -> torch.Tensor:
            full.update(*layer.arrived)
            expected = full.attend(query, *args)
            output = attend(query, *args)
            if query.shape[2] == 1:
                difference = (output.double() - expected.double()).square().sum()
                self._squares[:, index] += torch.stack([difference, expected.double().square().sum()]).cpu()
            return output

        return attend_both
