"""The mixture-of-experts layer: a router and its experts, with a count of the load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pikv_core.moe.experts import Experts
from pikv_core.moe.routing import Routing


class MoE(nn.Module):
    """Send tokens to experts and add up what these return; no token is dropped."""

    def __init__(self, gate: Any, experts: Experts):
        super().__init__()
        self.gate = gate
        self.experts = experts
        self._expert_tokens: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Return y like x [..., D], and the routing; mask [...] is True for real tokens."""
        routing = self.gate(x, mask)
        counts = routing.expert_tokens.detach()
        self._expert_tokens = counts if self._expert_tokens is None else self._expert_tokens + counts
        y = self.experts(x.reshape(-1, x.shape[-1]), routing.weights, routing.experts)
        return y.view_as(x), routing

    def reset_stats(self) -> None:
        """Forget the load counted so far."""
        self._expert_tokens = None

    def get_stats(self) -> dict[str, Any]:
        """Return the load since the last reset: per expert, max/mean, coefficient of variation, dropped."""
        counts = self._expert_tokens
        tokens = [0] * self.experts.num_experts if counts is None else counts.tolist()
        load = torch.tensor(tokens, dtype=torch.float64)
        mean = float(load.mean())
        return {
            "expert_tokens": tokens,
            "load_max_over_mean": float(load.max()) / mean if mean else 0.0,
            "load_cv": float(load.std(correction=0)) / mean if mean else 0.0,
            "dropped_tokens": 0,
        }
