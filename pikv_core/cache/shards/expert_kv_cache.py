"""ExpertKVCache: a PiKVCache whose older tokens lie in the shards of experts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from pikv_core import recipes
from pikv_core.cache.cache import PiKVCache
from pikv_core.schema import CacheRecipe


class ExpertKVCache(PiKVCache):
    """Serve a model's `past_key_values` from `experts` shards, of which each query reads the best `top_k`.

    by: "router" sends tokens where the model's own routers do, "keys" to clusters of keys. cache: codec, calibration
    and what else a recipe holds. options: of the policy `expert-shards`. Raises UsageError where a model has no router
    and one is asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        experts: int = 8,
        top_k: int | None = 2,
        by: str = "keys",
        cache: dict[str, Any] | None = None,
        **options: Any,
    ):
        policy = {"name": "expert-shards", "shards": experts, "top_shards": top_k, "by": by, **options}
        super().__init__(model.config, recipes.validate(CacheRecipe, {**(cache or {}), "policy": policy}, "cache"))
        self.attach(model)

    @classmethod
    def from_recipe(cls, config: Any, recipe: Any) -> PiKVCache:
        """Return the cache that a recipe describes, which says by itself what it keeps."""
        return PiKVCache.from_recipe(config, recipe)
