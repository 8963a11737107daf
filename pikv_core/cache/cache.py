"""PiKVCache: a transformers cache that keeps what a policy says, in the form a codec says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from pikv_core import recipes
from pikv_core.cache.attention import ENTRY
from pikv_core.cache.budget import Budget, Shape
from pikv_core.cache.layer import CacheLayer
from pikv_core.cache.support import windows
from pikv_core.components import build
from pikv_core.compression import CODECS
from pikv_core.errors import PiKVError, UsageError
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.base import Evictor, Selector
from pikv_core.schema import CacheRecipe


class PiKVCache(Cache):
    """Serve as `past_key_values` of any decoder that attends through transformers' attention interface.

    config: the model's own config object; its attention is switched to the entry "pikv", which without a PiKVCache
    is transformers' SDPA. recipe: policy, budget, allocation and codec.
    """

    def __init__(self, config: Any, recipe: CacheRecipe | None = None):
        recipe = recipe or CacheRecipe()
        policy, codec = build(POLICIES, recipe.policy), build(CODECS, recipe.codec)
        allocation, budget = build(ALLOCATIONS, recipe.allocation), Budget(recipe.budget)
        _refuse_bytes_for_selectors(recipe)
        self.recipe = recipe
        per_layer = windows(config)
        self._layer_bytes = [0] * len(per_layer)
        self._total_bytes = self.peak_bytes = 0
        super().__init__(
            layers=[
                CacheLayer(index, len(per_layer), policy, codec, allocation, budget, window, self._note_bytes)
                for index, window in enumerate(per_layer)
            ]
        )
        self._config = config
        config._attn_implementation = ENTRY

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Hand new keys and values [B,G,T,D] to a layer, which the attention entry then gets in their place."""
        if self._config._attn_implementation != ENTRY:
            raise PiKVError(
                f"the model's attention was set to '{self._config._attn_implementation}' after the cache was made",
                hint="call cache.attach(model)",
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @classmethod
    def from_recipe(cls, config: Any, recipe: Any) -> PiKVCache:
        """Build from a CacheRecipe, a recipe that holds one, a mapping of its keys, or a YAML file of `generate`."""
        if isinstance(recipe, str | Path):
            recipe = recipes.load("generate", recipe, flags={"model": "given"})
        if isinstance(recipe, Mapping):
            recipe = recipes.validate(CacheRecipe, recipe, "cache")
        return cls(config, recipe if isinstance(recipe, CacheRecipe) else recipe.cache)

    @property
    def own_layers(self) -> list[CacheLayer]:
        """The layers, as what they are."""
        return cast("list[CacheLayer]", self.layers)

    @staticmethod
    def in_tokens(config: Any, recipe: CacheRecipe, dtype: torch.dtype) -> CacheRecipe:
        """Return the recipe with a budget in bytes turned into the tokens per head it is for one sequence."""
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        shape = Shape(len(windows(config)), 1, kv_heads, head_dim, dtype)
        _refuse_bytes_for_selectors(recipe)
        policy = build(POLICIES, recipe.policy)
        columns = len(policy.columns) if isinstance(policy, Evictor) else 0
        budget = Budget(recipe.budget).resolve(shape, build(CODECS, recipe.codec), columns)
        return recipe.model_copy(update={"budget": budget.value})

    def attach(self, model: PreTrainedModel) -> PiKVCache:
        """Make `model` attend through this cache's entry, and return the cache."""
        model.set_attn_implementation(ENTRY)
        return self

    @property
    def resident_bytes(self) -> int:
        """Bytes of live storage over all layers."""
        return sum(layer.resident_bytes for layer in self.own_layers)

    @property
    def full_bytes(self) -> int:
        """Bytes that transformers' own cache would hold for the same tokens and dtype."""
        return sum(layer.full_bytes for layer in self.own_layers)

    @property
    def num_stored(self) -> list[int]:
        """Slots per head of each layer."""
        return [layer.num_stored for layer in self.own_layers]

    def retrieve(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values [B,G,S,D], decoded, and their true positions [B,G,S] (-1: empty)."""
        return self.own_layers[layer].retrieve()

    def hold(self) -> None:
        """Keep all that arrives, whatever the budget, until `compress`; statistics go on."""
        for layer in self.own_layers:
            layer.hold()

    def compress(self) -> None:
        """End `hold`: drop what is over budget and encode."""
        for layer in self.own_layers:
            layer.compress()

    def reset(self) -> None:
        """Forget every token and the peak."""
        super().reset()
        self._layer_bytes = [0] * len(self.own_layers)
        self._total_bytes = self.peak_bytes = 0

    def rewind(self, num_tokens: int) -> None:
        """Forget the newest tokens, fed while the cache was held."""
        for layer in self.own_layers:
            layer.rewind(num_tokens)

    def _note_bytes(self, layer: int) -> None:
        held = self.own_layers[layer].resident_bytes
        self._total_bytes += held - self._layer_bytes[layer]
        self._layer_bytes[layer] = held
        self.peak_bytes = max(self.peak_bytes, self._total_bytes)


def _refuse_bytes_for_selectors(recipe: CacheRecipe) -> None:
    if isinstance(recipe.budget, str) and issubclass(POLICIES[recipe.policy.name], Selector):
        raise UsageError(
            f"policy '{recipe.policy.name}' drops nothing, so a budget of {recipe.budget} in bytes means nothing",
            hint="give the tokens it reads: a share such as 0.25, or a number per head such as 512",
        )
