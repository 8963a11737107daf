"""Routing of Time-MoE (2409.16040): plain softmax weights, beside a shared expert behind a sigmoid gate."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pikv_core.errors import UsageError
from pikv_core.moe.router import Router
from pikv_core.moe.routers import ROUTERS
from pikv_core.moe.routing import Routing


@ROUTERS.register("time")
class TimeRouter(Router):
    """Send each token to its K most probable experts, whose weights are not renormalised.

    num_periods: time_info enters the scores by a learned projection, zero at first, of its sine and cosine at
    periods of 2, 4, ..., 2^num_periods of its units. This is ours; the paper's router sees the token alone.
    """

    shared_expert: ClassVar[bool] = True
    told: ClassVar[str | None] = "time_info"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        balance_weight: float = 0.02,
        z_weight: float = 0.0,
        num_periods: int = 8,
        **options: Any,
    ):
        super().__init__(hidden_size, num_experts, top_k, balance_weight=balance_weight, z_weight=z_weight, **options)
        if num_periods < 1:
            raise UsageError(f"num_periods: expected a whole number of at least 1, got {num_periods}")
        self.num_periods = num_periods
        self.time_weight = nn.Parameter(torch.zeros(num_experts, 2 * num_periods))

    def forward(self, x: Tensor, time_info: Tensor | None = None, mask: Tensor | None = None) -> Routing:  # type: ignore[override]
        """Route x [..., D]; time_info [...]: when each token is, in steps; mask [...] as of every router."""
        mask_T = None if mask is None else mask.reshape(-1)
        return self.route(x.reshape(-1, x.shape[-1]), mask_T, None if time_info is None else time_info.reshape(-1))

    def logits(self, x_TD: Tensor, info_T: Tensor | None) -> Tensor:
        if info_T is None:
            # Zeros, not nothing: data-parallel training expects a gradient of every weight in every step.
            features = x_TD.new_zeros(len(x_TD), 2 * self.num_periods)
        else:
            features = time_features(info_T, self.num_periods).to(x_TD.dtype)
        return super().logits(x_TD, info_T) + features @ self.time_weight.to(x_TD.dtype).T

    def choose(self, logits_TE: Tensor, probs_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        weights_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
        return weights_TK, experts_TK

    @property
    def top_k_weights(self) -> str | None:
        """Say "plain" where nothing was learnt of the time, and of a single expert."""
        return "plain" if self.num_experts == 1 or not bool(self.time_weight.any()) else None


def time_features(time_T: Tensor, num_periods: int) -> Tensor:
    """Return [T, 2·num_periods] float64: sines, then cosines, of time at periods of 2, 4, ... units.

    In float64, where times as large as a clock's seconds keep their phase.
    """
    periods = 2.0 ** torch.arange(1, num_periods + 1, device=time_T.device, dtype=torch.float64)
    angles = 2 * math.pi * (time_T.double()[:, None] / periods % 1)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
