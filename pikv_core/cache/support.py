"""Which decoders the cache serves, how far each of their layers looks back, and which recipes make no sense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pikv_core.cache.budget import Budget
from pikv_core.components import build
from pikv_core.compression.base import Codec
from pikv_core.errors import PiKVError, UsageError
from pikv_core.observation import LayerRun
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.allocation.asked import Asked
from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.base import Evictor, Policy, Selector, ShardSelector
from pikv_core.schema import CacheRecipe


def windows(config: Any) -> list[int | None]:
    """Return each layer's sliding window in tokens, None for full attention.

    Raises PiKVError for an architecture whose cache holds something else, by name and with the reason.
    """
    text = config.get_text_config(decoder=True)
    kind = text.model_type
    if getattr(text, "kv_lora_rank", None):
        raise PiKVError(
            f"model type '{kind}' caches latent vectors (multi-head latent attention), not keys and values",
            hint="use a decoder with grouped-query attention (llama, qwen3, mistral, mixtral, qwen3_moe, pikv, ...)",
        )
    if getattr(text, "num_kv_shared_layers", None):
        raise PiKVError(
            f"model type '{kind}' lets some layers read the keys and values of others",
            hint="use a decoder whose layers each have a cache of their own",
        )
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    other = sorted(set(types) - {"full_attention", "sliding_attention"})
    if other:
        raise PiKVError(
            f"model type '{kind}' has layers of type {', '.join(other)}, whose cache holds no plain keys and values",
            hint="full_attention and sliding_attention layers are supported",
        )
    return [window if layer == "sliding_attention" else None for layer in types]


def check_layers(policy: Policy, allocation: Allocation, budget: Budget, per_layer: Sequence[int | None]) -> None:
    """Raise UsageError where a selector would select in no layer, or a budget be spread over unlike layers.

    per_layer: what `windows` returns.
    """
    selects = isinstance(policy, Selector) and policy.limits_itself
    if not budget.limits and not selects:
        return
    if isinstance(policy, Evictor) and (len(set(per_layer)) > 1 or (policy.asks and any(per_layer))):
        owns = type(policy).capacity is not Evictor.capacity or policy.asks
        if owns or allocation.parts_layers:
            raise UsageError(
                f"{f'policy {policy.name!r}' if owns else f'allocation {allocation.name!r}'} spreads one budget over "
                "the layers, and some of this model's have a sliding window, which holds fewer tokens",
                hint="choose allocation uniform or ada-kv, and a policy that leaves the budget to them",
            )
    if not isinstance(policy, Selector) or any(window is None for window in per_layer[policy.dense_layers :]):
        return
    raise UsageError(
        f"policy '{policy.name}' would read everything in each of the model's {len(per_layer)} layers: it leaves out "
        f"the first {policy.dense_layers} and those with a sliding window",
        hint=f"{'lower its dense_layers, or ' * (policy.dense_layers > 0)}choose a policy that drops tokens",
    )


def allocation_of(recipe: CacheRecipe, policy: Policy) -> Allocation:
    """Return how a recipe's budget is spread; raise UsageError where both its policy and its allocation would."""
    if not (isinstance(policy, Evictor) and policy.asks):
        allocation: Allocation = build(ALLOCATIONS, recipe.allocation)
        return allocation
    if recipe.allocation.name != "uniform":
        raise UsageError(
            f"policy '{policy.name}' spreads the budget by what its layers ask for, so allocation "
            f"'{recipe.allocation.name}' does not go with it",
            hint="leave out the allocation, or the policy's mode",
        )
    return Asked()


def check_selector(selector: Selector, codec: Codec, run: LayerRun) -> None:
    """Raise UsageError where a layer's selector cannot work over a codec, or knows nothing of the model's router."""
    if not isinstance(selector, ShardSelector):
        return
    if codec.unit_tokens != 1:
        raise UsageError(
            f"policy '{selector.name}' fills pages token by token, and codec '{codec.name}' encodes "
            f"{codec.unit_tokens} at once",
            hint="choose codec none, svd or lora",
        )
    if selector.by == "router" and run.routing is None:
        raise UsageError(
            f"policy '{selector.name}' goes by the model's router, which the cache was not attached to",
            hint="make the cache by PiKVCache.for_model(model, recipe)",
        )


def check_recipe(recipe: CacheRecipe) -> None:
    """Raise UsageError for parts of a recipe that do not go together."""
    name, policy = recipe.policy.name, POLICIES[recipe.policy.name]
    allocation = ALLOCATIONS[recipe.allocation.name]
    if issubclass(policy, Evictor) and policy.capacity is not Evictor.capacity and recipe.allocation.name != "uniform":
        raise UsageError(
            f"policy '{name}' spreads the budget itself, so allocation '{recipe.allocation.name}' does not go with it",
            hint="leave out the allocation",
        )
    if not issubclass(policy, Selector):
        return
    if allocation.splits_heads or allocation.compares_layers:
        raise UsageError(
            f"policy '{name}' drops nothing, and allocation '{recipe.allocation.name}' goes by what is dropped",
            hint="choose uniform or pyramid, or a policy that drops tokens",
        )
    if isinstance(recipe.budget, str):
        raise UsageError(
            f"policy '{name}' drops nothing, so a budget of {recipe.budget} in bytes means nothing",
            hint="give the tokens it reads: a share such as 0.25, or a number per head such as 512",
        )
    if recipe.rerotate:
        raise UsageError(
            f"policy '{name}' chooses pages by the keys as they were rotated, so rerotate does not go with it",
            hint="leave out rerotate, or choose a policy that drops tokens",
        )
