"""Which caches come to a step of one token that is the same every time, so that it can be recorded and replayed.

At its budget a layer puts the new token into a spare slot, attends over one more than it keeps, and drops one: shapes
and addresses stay. That holds where a budget in tokens is reached for good, tokens are stored as they are, and the
policy asks the device for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from pikv_core.errors import UsageError
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.allocation.base import Allocation
from pikv_core.scheduling.base import Evictor, Policy
from pikv_core.schema import CacheRecipe


def check_static(recipe: CacheRecipe, policy: Policy, allocation: Allocation, per_layer: Sequence[int | None]) -> None:
    """Raise UsageError, with the reason, for a recipe under which a step is never the one before it.

    per_layer: each layer's sliding window, None for full attention.
    """
    if not isinstance(policy, Evictor):
        raise UsageError(f"policy '{policy.name}' drops nothing, so what a step reads grows with every token", _hint())
    if not has_static_steps(type(policy)) or policy.asks:
        spreads = _owns_budgets(type(policy)) or policy.asks
        reason = "spreads budgets by how much was seen" if spreads else "decides as it goes"
        raise UsageError(f"policy '{policy.name}' {reason}, so no step stands for the next", _hint())
    if isinstance(recipe.budget, float):
        raise UsageError(
            f"a budget of {recipe.budget} of the tokens seen grows with every token",
            hint="give it in tokens per head such as 512, or in bytes such as 64MiB",
        )
    if allocation.parts_layers:
        raise UsageError(
            f"allocation '{allocation.name}' spreads budgets by how much was seen, so no step stands for the next",
            hint="choose allocation uniform or ada-kv",
        )
    if recipe.codec.name != "none":
        raise UsageError(
            f"codec '{recipe.codec.name}' encodes newest tokens when there is a unit of them, so steps differ",
            hint="choose codec none",
        )
    if recipe.rerotate or any(window is not None for window in per_layer):
        reason = "rerotate moves keys" if recipe.rerotate else "a sliding window moves"
        raise UsageError(f"{reason} with every token", hint="this needs full attention to keys as they are stored")


def has_static_steps(policy: type[Policy]) -> bool:
    """Tell whether steps of one token are alike under a policy once its budget is reached."""
    if not issubclass(policy, Evictor) or _owns_budgets(policy):
        return False
    return policy.is_static or policy.decides_once


def _owns_budgets(policy: type[Evictor]) -> bool:
    return policy.capacity is not Evictor.capacity


def _hint() -> str:
    return f"these do: {', '.join(name for name in POLICIES.names() if has_static_steps(POLICIES[name]))}"
