"""Balancing without an auxiliary loss (2408.15664): a bias of each expert, used to select and never to weigh."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_core.collectives import total
from pikv_core.errors import UsageError
from pikv_core.moe.router import Router
from pikv_core.moe.routers import ROUTERS
from pikv_core.moe.routing import Routing

SCORES = ("sigmoid", "softmax")


@ROUTERS.register("balanced")
class BalancedRouter(Router):
    """Take the K experts of the highest score + bias, and weigh them by their scores alone, renormalised.

    score: "sigmoid" of the logits, as published, or their "softmax". After each optimizer step the bias of an expert
    moves by `rate` towards balance: up where it had less than the mean load since the last step, down where more.
    Losses: balance, 1 where the load is balanced, off by default; z.
    """

    bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        balance_weight: float = 0.0,
        z_weight: float = 0.001,
        capacity_factor: float | None = None,
        rate: float = 0.001,
        score: str = "sigmoid",
    ):
        if score not in SCORES:
            raise UsageError(f"unknown score '{score}'", hint=f"score is one of: {', '.join(SCORES)}")
        super().__init__(hidden_size, num_experts, top_k, balance_weight, z_weight, capacity_factor)
        self.rate = rate
        self.score = score
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))
        # Not a buffer: data-parallel wrappers overwrite buffers with the first rank's before a forward, and the
        # counts of a rank are its own until end_step adds them up.
        self._load: Tensor | None = None

    def choose(self, logits_TE: Tensor, probs_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weights [T, K] and the experts [T, K], highest score + bias first."""
        log_scores_TE = F.logsigmoid(logits_TE) if self.score == "sigmoid" else logits_TE.log_softmax(-1)
        experts_TK = (log_scores_TE.exp() + self.bias).topk(self.top_k, dim=-1).indices
        # A softmax of logarithms is the renormalised score, and has no 0/0 where all chosen scores are tiny.
        return log_scores_TE.gather(1, experts_TK).softmax(-1), experts_TK

    @property
    def top_k_weights(self) -> str | None:
        """Say "renormalised" of softmax scores where the bias moves no choice, and of a single expert."""
        unbiased = self.top_k == self.num_experts or not bool(self.bias.any())
        standard = self.num_experts == 1 or (self.score == "softmax" and unbiased)
        return "renormalised" if standard else None

    def route(self, x_TD: Tensor, mask_T: Tensor | None, info_T: Tensor | None = None) -> Routing:
        """Route tokens [T, D]; in training, add their choices to the load of this step."""
        routing = super().route(x_TD, mask_T, info_T)
        if self.training:
            self._load = routing.expert_tokens if self._load is None else self._load + routing.expert_tokens
        return routing

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the bias by the load of all forwards since the last step, over all data-parallel ranks."""
        own = torch.zeros_like(self.bias, dtype=torch.int64) if self._load is None else self._load
        load = total(own)  # asked by every rank, one without tokens too
        self.bias += self.rate * (load.double().mean() - load).sign().to(self.bias.dtype)
        self.bias -= self.bias.mean()
        self._load = None

    def get_stats(self) -> dict[str, Any]:
        """Return the bias of each expert."""
        return {"bias": self.bias.tolist()}
