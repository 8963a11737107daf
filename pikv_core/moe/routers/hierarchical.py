"""Two-level routing: first groups, then experts inside them (1701.06538, appendix B; group limit as in 2405.04434).

Letters: T tokens, K choices, G groups, E experts in order of their groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pikv_core.errors import UsageError
from pikv_core.moe.router import Router
from pikv_core.moe.routers import ROUTERS


@ROUTERS.register("hierarchical")
class HierarchicalRouter(Router):
    """Choose the `top_groups` most probable groups, and in them the K most probable experts.

    The probability of an expert is p(group)·p(expert | group), and sums to 1 over all; the weights of the K are
    renormalised. num_groups divides num_experts, by default its largest divisor up to the square root; top_groups: by
    default as few as hold K experts. Losses: balance over experts, 1 where the load is balanced; z of the group scores,
    (ln G)² where they are zero.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        balance_weight: float = 0.01,
        z_weight: float = 0.001,
        capacity_factor: float | None = None,
        num_groups: int | None = None,
        top_groups: int | None = None,
    ):
        super().__init__(hidden_size, num_experts, top_k, balance_weight, z_weight, capacity_factor)
        divisors = [number for number in range(1, num_experts + 1) if num_experts % number == 0]
        nearest_root = max(number for number in divisors if number <= math.isqrt(num_experts))
        self.num_groups = nearest_root if num_groups is None else num_groups
        if self.num_groups not in divisors:
            raise UsageError(
                f"num_groups: {self.num_groups} does not divide the {num_experts} experts",
                hint=f"num_groups is one of: {', '.join(map(str, divisors))}",
            )
        fewest = math.ceil(top_k * self.num_groups / num_experts)
        self.top_groups = fewest if top_groups is None else top_groups
        if not fewest <= self.top_groups <= self.num_groups:
            raise UsageError(
                f"top_groups: {self.top_groups} of {self.num_groups} groups cannot hold {top_k} choices",
                hint=f"top_groups is a whole number from {fewest} to {self.num_groups}",
            )
        self.group_weight = nn.Parameter(torch.empty(self.num_groups, hidden_size))
        nn.init.normal_(self.group_weight, std=hidden_size**-0.5)

    def logits(self, x_TD: Tensor, info_T: Tensor | None) -> Tensor:
        """Return score(group) + ln p(expert | group) [T, E], whose softmax is the product of both."""
        inside_TGe = super().logits(x_TD, info_T).unflatten(-1, (self.num_groups, -1)).log_softmax(-1)
        groups_TG = x_TD @ self.group_weight.to(x_TD.dtype).T
        return (groups_TG[..., None] + inside_TGe).flatten(1)

    def choose(self, logits_TE: Tensor, probs_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weights [T, K] and the experts [T, K] of the chosen groups, best first."""
        probs_TGe = probs_TE.unflatten(-1, (self.num_groups, -1))
        groups = probs_TGe.sum(-1).topk(self.top_groups, dim=-1).indices
        chosen_TG = torch.zeros_like(probs_TGe[..., 0], dtype=torch.bool).scatter(1, groups, True)
        weights_TK, experts_TK = probs_TGe.masked_fill(~chosen_TG[..., None], -1.0).flatten(1).topk(self.top_k, dim=-1)
        return weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK

    @property
    def top_k_weights(self) -> str | None:
        """Say "renormalised" of a single group, whose score adds the same to every expert's."""
        return "renormalised" if self.num_groups == 1 else None
