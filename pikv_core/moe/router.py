"""What every router shares: float32 scores, K experts for each token, losses and counts; a router is one file.

Letters: T tokens, K choices of each, E experts, D hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pikv_core.moe.capacity import slots, within_capacity
from pikv_core.moe.routing import Routing, balance_loss, count_tokens, z_loss


class Router(nn.Module):
    """Score experts by one linear map, in float32 under autocast too; subclasses change what they must.

    capacity_factor: in training an expert takes at most capacity_factor·T·K/E choices, all first ones before any
    second; the others are dropped and counted. In evaluation nothing is dropped, so that no token depends on a later.
    """

    name: ClassVar[str]
    loss_weights: dict[str, float]

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        balance_weight: float = 0.01,
        z_weight: float = 0.001,
        capacity_factor: float | None = None,
    ):
        super().__init__()
        self.top_k = top_k
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.loss_weights = {"balance": balance_weight, "z": z_weight}
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route x [..., D]; mask [...] is True for real tokens, the others count in no loss, statistic or capacity."""
        return self.route(x.reshape(-1, x.shape[-1]), None if mask is None else mask.reshape(-1))

    def route(self, x_TD: Tensor, mask_T: Tensor | None, info_T: Tensor | None = None) -> Routing:
        """Route tokens [T, D]; info_T: what a router of its own kind is told of each token."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD.float(), info_T)
            probs_TE = logits_TE.softmax(-1)
            weights_TK, experts_TK = self.choose(logits_TE, probs_TE, mask_T)
            expert_tokens = count_tokens(experts_TK, self.num_experts, mask_T)
            kept_TK = self.keep(experts_TK, mask_T)
            losses = self.losses(logits_TE, probs_TE, expert_tokens, mask_T, info_T)
        if kept_TK is not None:
            weights_TK = weights_TK * kept_TK
        return Routing(weights_TK, experts_TK, logits_TE, probs_TE, losses, self.loss_weights, expert_tokens, kept_TK)

    def logits(self, x_TD: Tensor, info_T: Tensor | None) -> Tensor:
        """Return the scores [T, E] of float32 tokens; probs are their softmax."""
        return x_TD @ self.weight.float().T

    def choose(self, logits_TE: Tensor, probs_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weights [T, K] and the experts [T, K], best first; experts of a token differ."""
        weights_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
        return weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK

    def keep(self, experts_TK: Tensor, mask_T: Tensor | None) -> Tensor | None:
        """Return bool [T, K], False for choices beyond an expert's capacity; None where nothing is dropped."""
        if self.capacity_factor is None or not self.training:
            return None
        real_TK = experts_TK if mask_T is None else experts_TK[mask_T]
        capacity = slots(real_TK, self.num_experts, self.capacity_factor)
        return within_capacity(experts_TK, self.num_experts, capacity, mask_T)

    def losses(
        self, logits_TE: Tensor, probs_TE: Tensor, expert_tokens: Tensor, mask_T: Tensor | None, info_T: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the losses by the names of loss_weights, scalars."""
        return {"balance": balance_loss(probs_TE, expert_tokens, mask_T), "z": z_loss(logits_TE, mask_T)}

    def end_step(self) -> None:
        """Update what is learnt without gradients; the trainer calls it once after each optimizer step."""

    def get_stats(self) -> dict[str, Any]:
        """Return what this kind of router has to tell beside the load."""
        return {}
