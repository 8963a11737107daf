"""The gates of FastMoE (2103.13262): naive, noisy (1701.06538), GShard (2006.16668), Switch (2101.03961)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pikv_core.errors import UsageError
from pikv_core.moe.router import Router, at_least_float32, skip_second
from pikv_core.moe.routers import ROUTERS
from pikv_core.moe.routing import Routing, balance_loss, count_tokens, z_loss

# The number of choices that a gate's rule is made for; None where any is.
TOP_K = {"naive": None, "noisy": None, "gshard": 2, "switch": 1}

MIN_STD = 0.01


@ROUTERS.register("fast")
class FastRouter(Router):
    """Send each token to K experts by one of four gates; what is random is so in training alone.

    gate: "naive" is softmax top-k. "noisy" adds to each logit normal noise of a learnt standard deviation. "gshard",
    K = 2, keeps the second choice with probability min(1, 2·weight). "switch", K = 1, scales its input by numbers from
    1 − jitter to 1 + jitter, and the weight is the plain probability; the others renormalise.
    Losses at perfect balance: "balance" 1, for naive and switch over all choices, for gshard over first ones;
    "importance" and "load" of noisy, squared coefficients of variation, 0. z is off by default, FastMoE has none; its
    naive gate has no balance loss either. capacity_factor: FastMoE's is 1.2 for gshard and switch.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        balance_weight: float = 0.01,
        z_weight: float = 0.0,
        capacity_factor: float | None = None,
        gate: str = "naive",
        jitter: float = 0.01,
    ):
        if gate not in TOP_K:
            raise UsageError(f"unknown gate '{gate}'", hint=f"gate is one of: {', '.join(TOP_K)}")
        if TOP_K[gate] not in (None, top_k):
            raise UsageError(
                f"top_k: the gate '{gate}' makes {TOP_K[gate]} choices a token, got {top_k}",
                hint=f"set top_k: {TOP_K[gate]}, or gate: naive or noisy",
            )
        super().__init__(hidden_size, num_experts, top_k, balance_weight, z_weight, capacity_factor)
        self.gate = gate
        self.jitter = jitter
        if gate == "noisy":
            self.loss_weights = {"importance": balance_weight, "load": balance_weight, "z": z_weight}
            self.noise_weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def route(self, x_TD: Tensor, mask_T: Tensor | None, info_T: Tensor | None = None) -> Routing:
        """Route tokens [T, D]; the noisy gate is told [T, 2, E] in training: deviations, and what was drawn."""
        if self.gate == "noisy" and self.training:
            with torch.autocast(x_TD.device.type, enabled=False):
                x_TD = at_least_float32(x_TD)
                std_TE = F.softplus(x_TD @ self.noise_weight.to(x_TD.dtype).T) + MIN_STD
                info_T = torch.stack([std_TE, torch.randn_like(std_TE)], dim=1)
        return super().route(x_TD, mask_T, info_T)

    def logits(self, x_TD: Tensor, info_T: Tensor | None) -> Tensor:
        """Return the scores [T, E], with the noise or the jitter of training."""
        if self.gate == "switch" and self.training:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_TE = super().logits(x_TD, info_T)
        return logits_TE if info_T is None else logits_TE + info_T.prod(1)

    def choose(self, logits_TE: Tensor, probs_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weights [T, K] and the experts [T, K], best first."""
        if self.gate == "switch":  # renormalised, a single weight would be 1 and teach the router nothing
            weights_TK, experts_TK = probs_TE.topk(1, dim=-1)
            return weights_TK, experts_TK
        return super().choose(logits_TE, probs_TE, mask_T)

    @property
    def top_k_weights(self) -> str | None:
        return "plain" if self.gate == "switch" else "renormalised"

    def skip(self, weights_TK: Tensor) -> Tensor | None:
        """Pass over second choices of small weight, under gshard."""
        return skip_second(weights_TK, 0.5) if self.gate == "gshard" else None

    def losses(
        self, logits_TE: Tensor, probs_TE: Tensor, expert_tokens: Tensor, mask_T: Tensor | None, info_T: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the losses of the gate and the z-loss."""
        losses = {"z": z_loss(logits_TE, mask_T)}
        if self.gate == "noisy":
            real_T = torch.ones_like(probs_TE[:, 0]) if mask_T is None else mask_T.to(probs_TE.dtype)
            weights_TK, experts_TK = self.choose(logits_TE, probs_TE, mask_T)
            weights_TE = torch.zeros_like(probs_TE).scatter(1, experts_TK, weights_TK)
            load_E = expert_tokens.to(probs_TE.dtype)
            if info_T is not None and self.top_k < self.num_experts:
                load_E = real_T @ chance_of_choice(logits_TE - info_T.prod(1), logits_TE, info_T[:, 0], self.top_k)
            return {"importance": squared_variation(real_T @ weights_TE), "load": squared_variation(load_E), **losses}
        if self.gate == "gshard":
            expert_tokens = count_tokens(probs_TE.argmax(-1, keepdim=True), self.num_experts, mask_T)
        return {"balance": balance_loss(probs_TE, expert_tokens, mask_T), **losses}


def chance_of_choice(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int) -> Tensor:
    """Return [T, E]: the probability that an expert is among the K best, its noise redrawn and the others' kept."""
    best = noisy_TE.topk(top_k + 1, dim=-1).values
    last_in, first_out = best[:, -2, None], best[:, -1, None]
    threshold_TE = torch.where(noisy_TE > first_out, first_out, last_in)
    return torch.special.ndtr((clean_TE - threshold_TE) / std_TE)


def squared_variation(values_E: Tensor) -> Tensor:
    """Return variance/mean², 0 where all values are equal and E − 1 where one has all."""
    return values_E.var(correction=0) / (values_E.mean().square() + 1e-10)
