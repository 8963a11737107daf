"""The mixture-of-experts layer: a router, its experts and perhaps a shared one, with a count of the load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pikv_core.collectives import total
from pikv_core.moe.routing import Routing, entropy_sum, load_spread
from pikv_core.moe.shared import SharedExpert


class MoE(nn.Module):
    """Send tokens to experts and add up what these return, with what the shared expert returns of every token."""

    def __init__(self, gate: Any, experts: Any, shared_expert: SharedExpert | None = None):
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_expert = shared_expert
        self._expert_tokens: Tensor | None = None
        self._shared_tokens: Tensor | int = 0
        self._dropped: Tensor | None = None
        self._entropy_sum: Tensor | float = 0.0
        self._num_routed: Tensor | int = 0

    def forward(self, x: Tensor, mask: Tensor | None = None, **info: Tensor) -> tuple[Tensor, Routing]:
        """Return y like x [..., D], and the routing.

        mask [...] is True for real tokens. info: what this router is told beside, such as `modality_info`.
        """
        routing = self.gate(x, mask=mask, **info)
        counts = routing.expert_tokens.detach()
        self._expert_tokens = counts if self._expert_tokens is None else self._expert_tokens + counts
        if routing.kept is not None:
            dropped = counts.sum() - routing.kept.sum()
            self._dropped = dropped if self._dropped is None else self._dropped + dropped
        entropy, num_tokens = entropy_sum(routing.probs.detach(), mask)
        self._entropy_sum, self._num_routed = self._entropy_sum + entropy, self._num_routed + num_tokens
        if self.shared_expert is not None:
            self._shared_tokens = self._shared_tokens + (len(routing.experts) if mask is None else mask.sum())
        return self.combine(x, routing), routing

    def combine(self, x: Tensor, routing: Routing) -> Tensor:
        """Return what the chosen experts and the shared one make of x [..., D]."""
        y = self.experts(x.reshape(-1, x.shape[-1]), routing.weights, routing.experts).view_as(x)
        return y if self.shared_expert is None else y + self.shared_expert(x)

    def reset_stats(self) -> None:
        """Forget the load counted so far."""
        self._expert_tokens = self._dropped = None
        self._shared_tokens = self._num_routed = 0
        self._entropy_sum = 0.0
        self.gate.reset_stats()

    def get_stats(self) -> dict[str, Any]:
        """Return the load since the last reset, dropped choices, and what the router and the experts have to tell.

        What is counted is that of all ranks, each of which has to ask.
        The load is that of the choices, dropped ones too: per expert, max/mean, coefficient of variation. Tokens
        of the shared expert are counted apart. router_entropy: of a token's probabilities, nats, the mean.
        """
        counts = self._expert_tokens
        counts = torch.zeros(self.gate.num_experts, dtype=torch.int64) if counts is None else total(counts)
        told = (self._entropy_sum, self._num_routed, self._dropped or 0, self._shared_tokens)
        entropy, num_routed, dropped, shared_tokens = total(
            torch.tensor([float(one) for one in told], dtype=torch.float64)
        ).tolist()
        stats = {
            "expert_tokens": counts.tolist(),
            **load_spread(counts),
            "router_entropy": entropy / max(1, num_routed),
            "dropped_tokens": int(dropped),
            **self.experts.get_stats(),
            **self.gate.get_stats(),
        }
        if self.shared_expert is not None:
            stats |= {"shared_expert_tokens": int(shared_tokens), **self.shared_expert.get_stats()}
        return stats
