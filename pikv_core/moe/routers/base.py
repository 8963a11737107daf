"""Softmax top-k routing with renormalised weights, as in Mixtral (2401.04088)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv_core.moe.routers import ROUTERS
from pikv_core.moe.routing import Routing, balance_loss, count_tokens, z_loss


@ROUTERS.register("base")
class BaseRouter(nn.Module):
    """Send each token to its K most probable experts; logits and softmax are float32, under autocast too."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        balance_weight: float = 0.01,
        z_weight: float = 0.001,
    ):
        super().__init__()
        self.top_k = top_k
        self.num_experts = num_experts
        self.loss_weights = {"balance": balance_weight, "z": z_weight}
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route x [..., D]; mask [...] is True for real tokens, the others count in no loss or statistic."""
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = None if mask is None else mask.reshape(-1)
        with torch.autocast(x.device.type, enabled=False):
            logits_TE = x_TD.float() @ self.weight.float().T
            probs_TE = logits_TE.softmax(-1)
            weights_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            expert_tokens = count_tokens(experts_TK, self.num_experts, mask_T)
            losses = {
                "balance": balance_loss(probs_TE, expert_tokens, mask_T),
                "z": z_loss(logits_TE, mask_T),
            }
        return Routing(weights_TK, experts_TK, logits_TE, probs_TE, losses, self.loss_weights, expert_tokens)
