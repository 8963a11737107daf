"""Mixture of experts: routers, stacked experts, and the layer that joins them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pikv_core.components import option_types
from pikv_core.errors import UsageError, closest
from pikv_core.moe.routers import ROUTERS

if TYPE_CHECKING:
    from pikv_core.moe.layer import MoE

__all__ = ["ROUTERS", "create_moe", "create_moe_router"]


def create_moe_router(kind: str, hidden_size: int, num_experts: int, top_k: int = 2, **options: Any) -> Any:
    """Build the router registered as `kind`; its forward maps x [..., D] to a Routing.

    options: further arguments of that router. Raises UsageError for an unknown kind or option, or impossible sizes.
    """
    ROUTERS.check(kind)
    _check_sizes(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
    if top_k > num_experts:
        raise UsageError(f"top_k: {top_k} is more than the {num_experts} experts", hint="lower top_k")
    router = ROUTERS[kind]
    allowed = list(option_types(router))
    for name in options:
        if name not in allowed:
            raise UsageError(
                f"the router '{kind}' has no option '{name}'{closest(name, allowed)}",
                hint=f"options of '{kind}' are: {', '.join(allowed)}",
            )
    return router(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, **options)


def create_moe(
    kind: str,
    hidden_size: int,
    num_experts: int,
    top_k: int = 2,
    expert_size: int | None = None,
    backend: str = "auto",
    rank: int | None = None,
    alpha: float = 1.0,
    train_base: bool = True,
    shared_expert: bool | None = None,
    shared_expert_size: int | None = None,
    shared_expert_gated: bool = True,
    use_distillation: bool = False,
    teacher_hidden_size: int | None = None,
    **options: Any,
) -> MoE:
    """Build a mixture of SwiGLU experts behind the router `kind`; call it as y, routing = moe(x).

    expert_size: width of one expert, by default hidden_size. backend: "auto" or a name in
    pikv_core.moe.experts.BACKENDS. rank, alpha, train_base: experts that share one base and differ by weights of
    this rank, see LoRAExperts; without rank each has whole weights. shared_expert: whether every token goes to one
    expert more, by default where the router asks for it; its width is that of a token's K experts together, the
    full width of Time-MoE. use_distillation: in training the layer may be shown what a teacher's returned, as
    moe(x, teacher_hidden=...), by default of hidden_size too, see DistilledMoE. options: further arguments of the
    router. Raises UsageError for what does not exist.
    """
    expert_size = hidden_size if expert_size is None else expert_size
    shared_expert_size = top_k * expert_size if shared_expert_size is None else shared_expert_size
    _check_sizes(expert_size=expert_size, shared_expert_size=shared_expert_size)
    if teacher_hidden_size is not None and not use_distillation:
        raise UsageError("teacher_hidden_size: there is no teacher", hint="set use_distillation=True")
    router = create_moe_router(kind, hidden_size, num_experts, top_k, **options)
    from pikv_core.moe.experts import Experts
    from pikv_core.moe.layer import MoE
    from pikv_core.moe.lora import LoRAExperts
    from pikv_core.moe.shared import SharedExpert

    experts: Experts | LoRAExperts
    if rank is None:
        experts = Experts(num_experts, hidden_size, expert_size, backend)
    else:
        experts = LoRAExperts(num_experts, hidden_size, expert_size, rank, alpha, train_base, backend)
    if shared_expert is None:
        shared_expert = getattr(router, "shared_expert", False)
    shared = SharedExpert(hidden_size, shared_expert_size, shared_expert_gated) if shared_expert else None
    if not use_distillation:
        return MoE(router, experts, shared)
    from pikv_core.moe.distillation import DistilledMoE, HiddenMatch

    return DistilledMoE(router, experts, shared, HiddenMatch(hidden_size, teacher_hidden_size))


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name}: expected a whole number of at least 1, got {value}")
