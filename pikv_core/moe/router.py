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
    sizes: ClassVar[tuple[str, ...]] = ("hidden_size", "num_experts", "top_k")  # the model's; the rest are options
    told: ClassVar[str | None] = None  # what forward may be told of each token beside, by its argument's name
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
            logits_TE = self.logits(at_least_float32(x_TD), info_T)
            probs_TE = logits_TE.softmax(-1)
            weights_TK, experts_TK = self.choose(logits_TE, probs_TE, mask_T)
            skipped_TK = self.skip(weights_TK) if self.training else None
            asked_TK = _asked(mask_T, skipped_TK)
            expert_tokens = count_tokens(experts_TK, self.num_experts, asked_TK)
            kept_TK = None if skipped_TK is None else asked_TK
            if self.training and self.capacity_factor is not None:
                kept_TK = self.keep(experts_TK, mask_T, asked_TK, info_T)
            losses = self.losses(logits_TE, probs_TE, expert_tokens, mask_T, info_T)
        if kept_TK is not None:
            weights_TK = weights_TK * kept_TK
        return Routing(weights_TK, experts_TK, logits_TE, probs_TE, losses, self.loss_weights, expert_tokens, kept_TK)

    def logits(self, x_TD: Tensor, info_T: Tensor | None) -> Tensor:
        """Return the scores [T, E] of tokens in float32 or wider; probs are their softmax."""
        return x_TD @ self.weight.to(x_TD.dtype).T

    def choose(self, logits_TE: Tensor, probs_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weights [T, K] and the experts [T, K], best first; experts of a token differ."""
        weights_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
        return weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK

    def skip(self, weights_TK: Tensor) -> Tensor | None:
        """Return bool [T, K], True for choices that chance passes over; None for none. Asked for in training alone."""
        return None

    def keep(self, experts_TK: Tensor, mask_T: Tensor | None, asked_TK: Tensor | None, info_T: Tensor | None) -> Tensor:
        """Return bool [T, K], False for choices beyond an expert's capacity and for those not in asked_TK."""
        assert self.capacity_factor is not None
        num_tokens = len(experts_TK) if mask_T is None else mask_T.sum()
        capacity = slots(num_tokens * self.top_k, self.num_experts, self.capacity_factor)
        return within_capacity(experts_TK, self.num_experts, capacity.to(experts_TK.device), asked_TK)

    def losses(
        self, logits_TE: Tensor, probs_TE: Tensor, expert_tokens: Tensor, mask_T: Tensor | None, info_T: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the losses by the names of loss_weights, scalars."""
        return {"balance": balance_loss(probs_TE, expert_tokens, mask_T), "z": z_loss(logits_TE, mask_T)}

    @property
    def top_k_weights(self) -> str | None:
        """Say how evaluation weighs the K most probable experts by softmax(x·weightᵀ): "renormalised" or "plain".

        None where it chooses or weighs otherwise; transformers' mixtures of experts know these two alone.
        """
        return None

    def end_step(self) -> None:
        """Update what is learnt without gradients; the trainer calls it once after each optimizer step."""

    def reset_stats(self) -> None:
        """Forget what was counted since the last reset; what is learnt stays."""

    def get_stats(self) -> dict[str, Any]:
        """Return what this kind of router has to tell beside the load."""
        return {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the module, and convert its parameters alone: a moving average in bfloat16 would stand still."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def skip_second(weights_TK: Tensor, threshold: float) -> Tensor:
    """Return bool [T, 2], False for first choices, and for second ones with probability min(1, weight/threshold)."""
    draw_T = torch.rand_like(weights_TK[:, 1])
    return torch.stack([torch.zeros_like(draw_T, dtype=torch.bool), draw_T * threshold >= weights_TK[:, 1]], dim=1)


def _asked(mask_T: Tensor | None, skipped_TK: Tensor | None) -> Tensor | None:
    """Return bool that broadcasts to [T, K]: choices of real tokens that chance left; None for all."""
    if mask_T is None:
        return None if skipped_TK is None else ~skipped_TK
    return mask_T[:, None] if skipped_TK is None else mask_T[:, None] & ~skipped_TK
