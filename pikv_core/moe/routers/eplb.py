"""Balance by copies: hot experts get more slots, and slots are placed over ranks by load, as in DeepSeek's EPLB.

Source: DeepSeek-V3 (2412.19437), section 3.4. Letters: T tokens, K choices of each, E experts, S slots, a slot being
one copy of an expert on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pikv_core.collectives import total
from pikv_core.errors import UsageError
from pikv_core.moe.router import Router
from pikv_core.moe.routers import ROUTERS
from pikv_core.moe.routing import Routing


@dataclass(frozen=True, eq=False)
class Placement:
    """Which expert each slot holds, on which rank, and the share of all choices that falls on it; all [S]."""

    experts: Tensor
    ranks: Tensor
    load: Tensor

    @property
    def load_max_over_mean(self) -> float:
        """Return the load of the busiest rank over the mean, 1 at balance."""
        load = torch.zeros(int(self.ranks.max()) + 1, dtype=self.load.dtype).index_add_(0, self.ranks, self.load)
        return float(load.max() / load.mean())


@ROUTERS.register("eplb")
class EPLBRouter(Router):
    """Route as `base`, measure the load, and plan from it where copies of the experts should lie.

    num_slots: experts and their further copies, by default one slot each. num_ranks: devices they are placed on.
    decay: of the counts measured, at each forward pass. The plan changes no output: it is for whoever moves experts.
    """

    load: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        num_slots: int | None = None,
        num_ranks: int = 1,
        decay: float = 0.99,
        **options: Any,
    ):
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.num_slots = num_experts if num_slots is None else num_slots
        self.num_ranks = num_ranks
        self.decay = decay
        _check_slots(num_experts, self.num_slots, num_ranks)
        if not 0 <= decay <= 1:
            raise UsageError(f"decay: expected a number from 0 to 1, got {decay}")
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.float32))

    def route(self, x_TD: Tensor, mask_T: Tensor | None, info_T: Tensor | None = None) -> Routing:
        routing = super().route(x_TD, mask_T, info_T)
        self.load.mul_(self.decay).add_(total(routing.expert_tokens))
        return routing

    @property
    def top_k_weights(self) -> str | None:
        return "renormalised"

    def plan(self, num_slots: int, num_ranks: int) -> Placement:
        """Return slots for the load measured so far, taken as even before any."""
        _check_slots(self.num_experts, num_slots, num_ranks)
        load_E = self.load.double().cpu()
        load_E = load_E / load_E.sum() if load_E.any() else torch.full_like(load_E, 1 / self.num_experts)
        experts_S = replicate(load_E, num_slots)
        load_S = (load_E / torch.bincount(experts_S, minlength=self.num_experts))[experts_S]
        return Placement(experts_S, place(load_S, num_ranks), load_S)

    def get_stats(self) -> dict[str, Any]:
        placement = self.plan(self.num_slots, self.num_ranks)
        return {
            "measured_load": (self.load / self.load.sum().clamp(min=1e-30)).tolist(),
            "slot_experts": placement.experts.tolist(),
            "slot_ranks": placement.ranks.tolist(),
            "rank_load_max_over_mean": placement.load_max_over_mean,
        }


def replicate(load_E: Tensor, num_slots: int) -> Tensor:
    """Return the expert of each slot [S], sorted: the slots beyond one each go to the highest load per copy.

    No other choice has a lower highest load per slot.
    """
    copies_E = torch.ones_like(load_E, dtype=torch.int64)
    for _ in range(num_slots - len(load_E)):
        copies_E[(load_E / copies_E).argmax()] += 1
    return torch.arange(len(load_E), device=load_E.device).repeat_interleave(copies_E)


def place(load_S: Tensor, num_ranks: int) -> Tensor:
    """Return the rank of each slot [S], as many on each: the heaviest slot left goes to the lightest rank with room."""
    slots_per_rank = len(load_S) // num_ranks
    loads, taken = [0.0] * num_ranks, [0] * num_ranks
    ranks_S = torch.empty(len(load_S), dtype=torch.int64)
    for slot in load_S.argsort(descending=True, stable=True).tolist():
        rank = min((rank for rank in range(num_ranks) if taken[rank] < slots_per_rank), key=loads.__getitem__)
        ranks_S[slot] = rank
        loads[rank] += float(load_S[slot])
        taken[rank] += 1
    return ranks_S


def spread(experts_TK: Tensor, experts_S: Tensor) -> Tensor:
    """Return the slot [T, K] of each choice: an expert's choices go to its slots in turn, so evenly."""
    experts_N = experts_TK.reshape(-1)
    num_experts = int(experts_S.max()) + 1
    order_N = experts_N.argsort(stable=True)
    counts_E = torch.bincount(experts_N, minlength=num_experts)
    turn_N = torch.empty_like(order_N)
    turn_N[order_N] = torch.arange(len(order_N), device=order_N.device) - _starts(counts_E)[experts_N[order_N]]
    copies_E = torch.bincount(experts_S, minlength=num_experts)
    slots_S = experts_S.argsort(stable=True)
    return slots_S[_starts(copies_E)[experts_N] + turn_N % copies_E[experts_N]].view_as(experts_TK)


def _starts(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0) - counts_E


def _check_slots(num_experts: int, num_slots: int, num_ranks: int) -> None:
    if num_slots < num_experts:
        raise UsageError(
            f"num_slots: {num_slots} slots do not hold {num_experts} experts", hint="an expert needs at least one slot"
        )
    if num_ranks < 1 or num_slots % num_ranks:
        raise UsageError(
            f"num_ranks: {num_slots} slots do not divide evenly by {num_ranks} ranks",
            hint="every rank holds as many slots",
        )
