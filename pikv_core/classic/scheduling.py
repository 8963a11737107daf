"""Schedulers: a layer's cache of so many tokens under a policy, fed with tensors.

Shapes: B batch, G key/value heads, H query heads, T new tokens, S stored tokens, D head dim; hidden_size = G·D.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from pikv_core import recipes
from pikv_core.cache import by_hand
from pikv_core.cache.layer import CacheLayer
from pikv_core.cache.support import check_recipe
from pikv_core.classic.lone_layer import as_given, by_heads, in_order, lone_layer
from pikv_core.components import build
from pikv_core.compression.none import Plain
from pikv_core.errors import UsageError
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Policy, Selector
from pikv_core.scheduling.flexgen import FlexGen
from pikv_core.schema import CacheRecipe

METADATA = ("queries", "positions", "layer_idx")

SchedulingPolicy = Enum(  # type: ignore[misc]
    "SchedulingPolicy", {**{name.upper().replace("-", "_"): name for name in POLICIES.names()}, "NONE": "full"}
)
SchedulingPolicy.__doc__ = "Name every policy of the registry: H2O, LRU, STREAMING_LLM, ...; NONE is FULL."


class CacheSchedulingManager:
    """Keep `cache_size` tokens of every head as a policy says; a selector keeps all and reads so many.

    policy: a SchedulingPolicy or a name of the registry; options are the policy's. Tokens are plain, one layer at a
    time. Raises UsageError for a policy that needs a whole model.
    """

    def __init__(self, cache_size: int, hidden_size: int, policy: SchedulingPolicy | str = "lru", **options: Any):
        name = policy.value if isinstance(policy, SchedulingPolicy) else policy
        self.cache_size, self.hidden_size = cache_size, hidden_size
        if name in POLICIES.names() and issubclass(POLICIES[name], Selector):
            options = {"dense_layers": 0, **options}
        limit = {} if name in POLICIES.names() and not POLICIES[name].takes_budget else {"budget": cache_size}
        recipe = recipes.validate(CacheRecipe, {"policy": {"name": name, **options}, **limit}, type(self).__name__)
        check_recipe(recipe)
        self.policy: Policy = build(POLICIES, recipe.policy)
        asks_model = isinstance(self.policy, Evictor) and (self.policy.looks or self.policy.sees_queries)
        if self.policy.calibrated or asks_model:
            raise UsageError(
                f"policy '{name}' goes by what only a model can tell it",
                hint="run it in a model's cache: PiKVCache.for_model(model, {'policy': ...})",
            )
        if isinstance(self.policy, FlexGen):
            raise UsageError(
                f"policy '{name}' places a model's cache over tiers, and drops nothing",
                hint="run it in a model's cache: PiKVCache.for_model(model, {'policy': 'flexgen'})",
            )
        self._budget = recipe.budget
        self._layers: dict[int, CacheLayer] = {}
        self._newest = 0
        self._has_heads = False
        self._num_asked = self._num_hits = 0

    def update_cache(
        self, keys: torch.Tensor, values: torch.Tensor, metadata: Mapping[str, Any] | None = None
    ) -> torch.Tensor | None:
        """Add tokens, keys and values [B,T,hidden_size] or [B,G,T,D], and drop what is over cache_size.

        metadata: "queries" of these tokens, [B,T,hidden_size] or [B,H,T,D], which policies that go by attention need;
        then what they attend to is returned, in their form. "positions": the tokens that this step asks for, by
        position, which the hit rate counts; by default all so far, as attention asks. "layer_idx": which of several
        layers, 0 by default. Several tokens at once are a prompt.
        """
        given = dict(metadata or {})
        unknown = sorted({*given} - {*METADATA})
        if unknown:
            raise UsageError(f"metadata has no key '{unknown[0]}'", hint=f"it takes: {', '.join(METADATA)}")
        k, v = by_heads(keys, self.hidden_size, "keys"), by_heads(values, self.hidden_size, "values")
        index, queries = given.get("layer_idx", 0), given.get("queries")
        layer = self._layers[index] if index in self._layers else lone_layer(self.policy, self._budget, Plain(), index)
        asked, hits = _asked(layer, k, given.get("positions"))
        q = None if queries is None else queries[:, None] if queries.dim() == 3 else queries
        output = by_hand.append(layer, layer.seen_length, k, v, q)
        self._layers[index], self._newest, self._has_heads = layer, index, keys.dim() == 4
        self._num_asked, self._num_hits = self._num_asked + asked, self._num_hits + hits
        return None if queries is None or output is None else as_given(output, queries.dim() == 4)

    def get_cached_data(self, layer_idx: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of a layer, by default the last updated, by position, in the form given."""
        keys, values, _ = in_order(*self._layer(layer_idx).retrieve())
        return as_given(keys, self._has_heads), as_given(values, self._has_heads)

    def get_cached_positions(self, layer_idx: int | None = None) -> torch.Tensor:
        """Return the positions [B,G,S] of what `get_cached_data` returns."""
        return self._layer(layer_idx).positions().sort(dim=-1).values

    def get_cache_stats(self) -> dict[str, Any]:
        """Return what is measured over all layers and updates.

        hit_rate: of the tokens that were asked for, those that were stored at that time; an update asks for all tokens
        so far, or for the "positions" in its metadata. evictions: tokens dropped, over layers, rows and heads.
        current_size: tokens of a head, the mean of all. resident_bytes: of live storage, positions and statistics
        included; full_bytes: of all keys and values seen. events: what the policy tells of the run, such as switches.
        """
        layers = list(self._layers.values())
        seen = sum(int(layer.num_seen.sum()) * layer.dimensions[1] for layer in layers)
        stored = sum(int((layer.positions() >= 0).sum()) for layer in layers)
        heads = sum(rows * heads for rows, heads, _ in (layer.dimensions for layer in layers))
        size = stored / heads if heads else 0.0
        return {
            "policy": self.policy.name,
            "cache_size": self.cache_size,
            "current_size": size,
            "cache_utilization": size / self.cache_size,
            "hit_rate": self._num_hits / self._num_asked if self._num_asked else 0.0,
            "evictions": seen - stored,
            "resident_bytes": sum(layer.resident_bytes for layer in layers),
            "full_bytes": sum(layer.full_bytes for layer in layers),
            "events": [event for layer in layers for event in layer.run.events],
        }

    def _layer(self, index: int | None) -> CacheLayer:
        index = self._newest if index is None else index
        if index not in self._layers:
            raise UsageError(f"layer {index} holds no tokens yet", hint="call update_cache first")
        return self._layers[index]


class H2OScheduler(CacheSchedulingManager):
    """Keep heavy hitters and the newest tokens, `cache_size` together, in the proportion of the two ratios."""

    def __init__(self, cache_size: int, hidden_size: int, heavy_ratio: float = 0.1, recent_ratio: float = 0.1):
        if heavy_ratio < 0 or recent_ratio < 0 or heavy_ratio + recent_ratio == 0:
            raise UsageError(f"heavy_ratio {heavy_ratio} and recent_ratio {recent_ratio} are no proportion")
        super().__init__(cache_size, hidden_size, "h2o", heavy_share=heavy_ratio / (heavy_ratio + recent_ratio))


class LRUScheduler(CacheSchedulingManager):
    """Keep the tokens that attention used last; without queries a token is used when it comes, and never again."""

    def __init__(self, cache_size: int, hidden_size: int):
        super().__init__(cache_size, hidden_size, "lru")


class QUESTScheduler(CacheSchedulingManager):
    """Keep all tokens; each query reads the pages, `cache_size` tokens of them, whose key bounds promise most."""

    def __init__(self, cache_size: int, hidden_size: int, page_tokens: int = 16):
        super().__init__(cache_size, hidden_size, "quest", page_tokens=page_tokens)


def _asked(layer: CacheLayer, keys: torch.Tensor, positions: Any) -> tuple[int, int]:
    """Return how many tokens a step with new keys [B,G,T,D] asks for, over rows and heads, and how many it finds."""
    pairs, num_seen = keys.shape[0] * keys.shape[1], layer.seen_length + keys.shape[2]
    wanted = torch.arange(num_seen) if positions is None else torch.as_tensor(positions).flatten().cpu()
    if len(wanted) and not (0 <= int(wanted.min()) and int(wanted.max()) < num_seen):
        raise UsageError(f"positions are 0 to {num_seen - 1}, got {int(wanted.min())} to {int(wanted.max())}")
    num_new = int((wanted >= layer.seen_length).sum())
    if not layer.seen_length:
        return pairs * len(wanted), pairs * num_new
    is_stored = torch.zeros(pairs, num_seen + 1, dtype=torch.bool)
    is_stored.scatter_(1, layer.positions().flatten(0, 1).cpu().long(), True)
    return pairs * len(wanted), pairs * num_new + int(is_stored[:, wanted].sum())
