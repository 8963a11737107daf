"""Begin a prompt with what a prefix store holds of it, and store the rest once it is computed."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from pikv_core.cache import PiKVCache
from pikv_core.cache.prefix.blocks import dimensions, pack, put, take
from pikv_core.cache.prefix.identity import identity, least_fed
from pikv_core.cache.prefix.store import Measured, PrefixStore
from pikv_core.errors import UsageError
from pikv_core.model.steps import feed
from pikv_core.schema import CacheRecipe

if TYPE_CHECKING:
    from pikv_core.model.loading import LoadedModel
    from pikv_core.runs import Reporter
    from pikv_core.schema import GenerateRecipe


def open_store(recipe: GenerateRecipe, loaded: LoadedModel, reporter: Reporter) -> PrefixStore:
    """Open the recipe's store; raise UsageError where its cache cannot begin with stored blocks."""
    assert recipe.prefix_cache is not None
    least_fed(loaded.new_cache(recipe), loaded.model.config)
    return PrefixStore(
        recipe.prefix_cache,
        recipe.prefix,
        identity(loaded.model, recipe.cache),
        lambda: measure(loaded.model, recipe.cache, recipe.prefix.block_tokens),
        reporter.status,
    )


def measure(model: Any, recipe: CacheRecipe, block_tokens: int) -> Measured:
    """Feed a cache that keeps all a block of tokens, and tell what it makes of it."""
    cache = PiKVCache(model.config, CacheRecipe(codec=recipe.codec, calibration=recipe.calibration)).attach(model)
    cache.hold()
    feed(model, cache, torch.zeros(1, block_tokens, dtype=torch.long))
    unit = math.lcm(*(layer.plan.codec.unit_tokens for layer in cache.own_layers))
    if block_tokens % unit:
        raise UsageError(
            f"codec '{cache.recipe.codec.name}' codes {unit} tokens at once, and a block would have {block_tokens}",
            hint=f"set prefix.block_tokens to a multiple of {unit}",
        )
    return Measured(len(pack(take(cache, slice(0, block_tokens)), "0" * 64)), dimensions(cache), unit)


class PrefixReuse(StoppingCriteria):
    """Put the stored beginning of a prompt [1,T] into an empty cache, and store the rest after its first token.

    Never stops. The prompt's last tokens are always fed: one, or as many as the policy observes. Nothing is dropped or
    encoded before its blocks are stored. store_s: what that took between the first token and the second.
    """

    def __init__(self, store: PrefixStore, model: Any, cache: PiKVCache, ids: torch.Tensor):
        self._store, self._cache = store, cache
        self._arrival = store.arrive(ids[0].tolist())
        most = ids.shape[1] - least_fed(cache, model.config)
        blocks = store.load(self._arrival, -(-self._usable(most) // store.settings.block_tokens))
        self._num_restored = self._usable(most)  # fewer where a block was lost
        if self._num_restored:
            like = torch.empty(0, dtype=model.dtype, device=model.device)
            put(cache, blocks, self._num_restored, store.measured.sizes, like)
        cache.hold()
        self.block_hits = self._arrival.hits
        self.store_s = 0.0

    def _usable(self, most: int) -> int:
        """Return the leading tokens that are stored, `most` of them, in whole units of the codec."""
        stored, unit = self._arrival.hits * self._store.settings.block_tokens, self._store.measured.unit_tokens
        return max(0, min(stored, most)) // unit * unit

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self._cache.is_held:
            started = time.perf_counter()
            size = self._store.settings.block_tokens
            self._store.keep(
                self._arrival,
                self._num_restored // size,
                lambda place: take(self._cache, slice(place * size, (place + 1) * size)),
            )
            self._cache.compress()
            self.store_s = time.perf_counter() - started
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self, output_tokens: int) -> None:
        """Let the store's log know of the request, which is done."""
        self._store.finish(self._arrival, self._num_restored, output_tokens)
