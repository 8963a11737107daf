"""Top-2 gating as in lucidrains' mixture-of-experts, which follows GShard (2006.16668) and tensor2tensor.

Letters: B sequences, S tokens of each, T = B·S, K = 2 choices, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_core.errors import UsageError
from pikv_core.moe.capacity import within_capacity
from pikv_core.moe.router import Router, skip_second
from pikv_core.moe.routers import ROUTERS
from pikv_core.moe.routing import Routing, z_loss

MIN_CAPACITY = 4


@ROUTERS.register("mixture")
class MixtureRouter(Router):
    """Send each token to its two best experts, to the second by chance, with slots for each sequence.

    In training the second expert is kept with probability min(1, weight/second_threshold), and an expert takes
    max(S·capacity_factor/E, 4) choices of a sequence. In evaluation both are used and nothing is dropped; the
    original draws and drops there too. Losses: balance, 1 where the load is balanced, and z, off by default.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        balance_weight: float = 0.01,
        z_weight: float = 0.0,
        capacity_factor: float | None = 1.25,
        second_threshold: float = 0.2,
    ):
        if top_k != 2:
            raise UsageError(f"top_k: a 'mixture' router makes 2 choices a token, got {top_k}", hint="set top_k: 2")
        if not second_threshold > 0:
            raise UsageError(f"second_threshold: expected a number above 0, got {second_threshold}")
        super().__init__(hidden_size, num_experts, top_k, balance_weight, z_weight, capacity_factor)
        self.second_threshold = second_threshold

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route x [..., S, D], one sequence or several; mask [..., S] is True for real tokens."""
        real = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
        real_BS = real.flatten(0, -2) if real.dim() > 1 else real[None]
        return self.route(x.reshape(-1, x.shape[-1]), real.reshape(-1), real_BS)

    @property
    def top_k_weights(self) -> str | None:
        return "renormalised"

    def skip(self, weights_TK: Tensor) -> Tensor:
        """Pass over second choices of small weight."""
        return skip_second(weights_TK, self.second_threshold)

    def keep(self, experts_TK: Tensor, mask_T: Tensor | None, asked_TK: Tensor | None, info_T: Tensor | None) -> Tensor:
        """Keep what fits the slots of its sequence; info_T: the mask [B, S]."""
        assert info_T is not None and asked_TK is not None and self.capacity_factor is not None
        num_tokens_B = info_T.sum(-1).double()
        # The original's bound of S slots is left out: a token takes at most one slot of an expert.
        capacity_B = (num_tokens_B * self.capacity_factor / self.num_experts).floor().clamp(min=MIN_CAPACITY)
        experts_BSK, asked_BSK = (choices.unflatten(0, info_T.shape) for choices in (experts_TK, asked_TK))
        return within_capacity(experts_BSK, self.num_experts, capacity_B, asked_BSK).flatten(0, 1)

    def losses(
        self, logits_TE: Tensor, probs_TE: Tensor, expert_tokens: Tensor, mask_T: Tensor | None, info_T: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the balance loss of first choices by sequence, and the z-loss; info_T: the mask [B, S]."""
        assert info_T is not None
        balance = first_choice_balance(probs_TE.unflatten(0, info_T.shape), info_T)
        return {"balance": balance, "z": z_loss(logits_TE, mask_T)}


def first_choice_balance(probs_BSE: Tensor, mask_BS: Tensor) -> Tensor:
    """Return E·Σ_e (share of first choices)·(mean probability), averaged over sequences with real tokens."""
    num_experts = probs_BSE.shape[-1]
    weights_BS = mask_BS / mask_BS.sum(-1, keepdim=True).clamp(min=1).to(probs_BSE.dtype)
    first_BSE = F.one_hot(probs_BSE.argmax(-1), num_experts).to(probs_BSE.dtype)
    shares_BE, means_BE = (torch.einsum("bs,bse->be", weights_BS, each) for each in (first_BSE, probs_BSE))
    return num_experts * (shares_BE * means_BE).sum() / mask_BS.any(-1).sum().clamp(min=1)
