"""What a cache loses of attention, layer by layer, beside a full cache given the same queries, keys and values.

Shapes: B batch, H query heads, G key/value heads, R = H/G, S stored tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from pikv_core.cache import PiKVCache
from pikv_core.cache.layer import CacheLayer


class AttentionError:
    """Run a full twin beside every layer of watched caches and compare single-token steps; the cache's output goes on.

    error_by_layer: ‖output − full output‖ / ‖full output‖ over all steps, heads and rows. mass_by_layer: the share of
    the full attention, over the tokens a query sees, that falls on tokens which the cache still holds.
    """

    def __init__(self, config: Any):
        self._config = config
        num_layers = len(PiKVCache(config).own_layers)
        self._squares = torch.zeros(2, num_layers, dtype=torch.float64)
        self._mass = torch.zeros(2, num_layers, dtype=torch.float64)

    @property
    def error_by_layer(self) -> list[float]:
        """The relative errors, 0 for a cache that loses nothing."""
        difference, size = self._squares
        return (difference / size).sqrt().tolist()

    @property
    def mass_by_layer(self) -> list[float]:
        """The shares, 1 for a cache that drops nothing."""
        held, all_of_it = self._mass
        return (held / all_of_it).tolist()

    def watch(self, cache: PiKVCache) -> PiKVCache:
        """Put a twin beside each layer of an empty cache, and return the cache."""
        twin = PiKVCache(self._config)
        for index, (layer, full) in enumerate(zip(cache.own_layers, twin.own_layers)):
            layer.attend = self._beside(index, layer, full)  # type: ignore[method-assign]
        return cache

    def _beside(self, index: int, layer: CacheLayer, full: CacheLayer) -> Any:
        attend = layer.attend

        def attend_both(query: torch.Tensor, scale: float, *args: Any) -> torch.Tensor:
            if layer.looking:
                return attend(query, scale, *args)
            full.update(*layer.arrived)
            expected = full.attend(query, scale, *args)
            if query.shape[2] > 1:
                return attend(query, scale, *args)
            self._mass[:, index] += _mass(query, scale, args[1] if len(args) > 1 else None, layer, full)
            output = attend(query, scale, *args)
            difference = (output.double() - expected.double()).square().sum()
            self._squares[:, index] += torch.stack([difference, expected.double().square().sum()]).cpu()
            return output

        return attend_both


def _mass(
    query: torch.Tensor, scale: float, softcap: float | None, layer: CacheLayer, full: CacheLayer
) -> torch.Tensor:
    """Return the full attention mass [2] of one new token [B,H,1,D] that falls on what `layer` holds, and all of it."""
    keys, _, position = full.retrieve()
    B, G = keys.shape[:2]
    logits = query.reshape(B, G, -1, keys.shape[-1]).float() @ keys.float().mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    probs = logits.masked_fill((position < 0)[:, :, None], -torch.inf).softmax(-1).mean(2)
    held = layer.positions()
    longest = int(position.max()) + 1
    is_held = torch.zeros(B, G, longest + 1, dtype=torch.bool, device=keys.device)
    is_held.scatter_(2, held.long().masked_fill(held < 0, longest), True)
    is_held.scatter_(2, position.amax(-1, keepdim=True).long(), True)  # the token itself
    is_held[..., longest] = False
    kept = torch.where(is_held.gather(2, position.long().clamp(min=0)), probs, 0)
    return torch.stack([kept.sum(), probs.sum()]).double().cpu()
