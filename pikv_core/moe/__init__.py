"""Mixture of experts: routers, stacked experts, and the layer that joins them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pikv_core.errors import UsageError
from pikv_core.moe.routers import ROUTERS

if TYPE_CHECKING:
    from pikv_core.moe.layer import MoE

__all__ = ["ROUTERS", "create_moe", "create_moe_router"]


def create_moe_router(kind: str, hidden_size: int, num_experts: int, top_k: int = 2, **options: Any) -> Any:
    """Build the router registered as `kind`; its forward maps x [..., D] to a Routing.

    options: further arguments of that router. Raises UsageError for an unknown kind or impossible sizes.
    """
    ROUTERS.check(kind)
    for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts), ("top_k", top_k)):
        if value < 1:
            raise UsageError(f"{name}: expected a whole number of at least 1, got {value}")
    if top_k > num_experts:
        raise UsageError(f"top_k: {top_k} is more than the {num_experts} experts", hint="lower top_k")
    return ROUTERS[kind](hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, **options)


def create_moe(
    kind: str,
    hidden_size: int,
    num_experts: int,
    top_k: int = 2,
    expert_size: int | None = None,
    backend: str = "auto",
    **options: Any,
) -> MoE:
    """Build a dropless mixture of SwiGLU experts behind the router `kind`; call it as y, routing = moe(x).

    expert_size: width of one expert, by default hidden_size. backend: "auto" or a name in
    pikv_core.moe.experts.BACKENDS. options: further arguments of the router. Raises UsageError for what
    does not exist.
    """
    router = create_moe_router(kind, hidden_size, num_experts, top_k, **options)
    from pikv_core.moe.experts import Experts
    from pikv_core.moe.layer import MoE

    return MoE(router, Experts(num_experts, hidden_size, expert_size or hidden_size, backend))
