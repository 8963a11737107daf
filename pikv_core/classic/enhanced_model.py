"""PiKVEnhancedModel: a language model that generates through a compressed cache."""

from __future__ import annotations

from typing import Any

from pikv_core import recipes
from pikv_core.cache import PiKVCache
from pikv_core.errors import UsageError
from pikv_core.model.generation import generate_batch
from pikv_core.model.loading import load_model
from pikv_core.runs import Reporter


class PiKVEnhancedModel:
    """Load a model folder, a run folder or a hub id; cache: keys of the cache's recipe, such as policy and budget.

    max_length: most tokens of a prompt and its continuation. Raises RecipeError for a wrong key, PiKVError where there
    is no such model.
    """

    def __init__(
        self, model_name: str, max_length: int = 1024, device: str = "auto", dtype: str = "auto", **cache: Any
    ):
        flags = {"model": model_name, "device": device, "dtype": dtype, "cache": cache}
        self.recipe = recipes.load("generate", None, (), flags)
        self.max_length = max_length
        self.loaded = load_model(model_name, self.recipe)
        self.cache: PiKVCache | None = None
        self._times: dict[str, float | None] = {}

    def generate(self, prompt: str, max_new_tokens: int = 50) -> str:
        """Return the prompt with its greedy continuation, of a new cache.

        Raises UsageError where both together have more than `max_length` tokens.
        """
        tokenizer = self.loaded.tokenizer
        ids = tokenizer(prompt)["input_ids"]
        if len(ids) + max_new_tokens > self.max_length:
            raise UsageError(
                f"{len(ids)} tokens and {max_new_tokens} new ones are more than max_length {self.max_length}",
                hint="raise max_length, or shorten the prompt",
            )
        recipe = self.recipe.model_copy(update={"max_new_tokens": max_new_tokens})
        self.cache = self.loaded.new_cache(recipe)
        (completion,), cost = generate_batch(self.loaded, recipe, [prompt], self.cache, Reporter(), streams=False)
        rate = cost.num_later_tokens / cost.decode_s if cost.decode_s else None
        self._times = {"time_to_first_token_s": cost.first_token_s, "tokens_per_s": rate}
        return tokenizer.decode([*ids, *completion.token_ids], skip_special_tokens=True)

    def get_stats(self) -> dict[str, Any]:
        """Return what was measured of the last `generate`, its cache being live.

        compression_stats: resident_bytes, full_bytes (of transformers' own cache), peak_bytes, compression_ratio
        (resident over full). cache_stats: hit_rate (of all tokens seen, those that the next query finds stored),
        evictions (over layers and heads), events (such as switches). generation_stats: times, None where no
        token followed the first.
        """
        if self.cache is None:
            raise UsageError("nothing has been generated yet", hint="call generate(prompt) first")
        cache = self.cache
        stored = sum(int((position >= 0).sum()) for position in cache.positions)
        seen = sum(int(layer.num_seen.sum()) * layer.dimensions[1] for layer in cache.own_layers)
        return {
            "compression_stats": {
                "compression_ratio": cache.resident_bytes / cache.full_bytes,
                "resident_bytes": cache.resident_bytes,
                "full_bytes": cache.full_bytes,
                "peak_bytes": cache.peak_bytes,
            },
            "cache_stats": {"hit_rate": stored / seen, "evictions": seen - stored, "events": list(cache.events)},
            "generation_stats": dict(self._times),
        }
