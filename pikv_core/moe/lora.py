"""Experts that differ by low-rank weights: one shared SwiGLU block, and LoRA (2106.09685) on it for each expert.

The products with the shared weights are taken once a token, not once a choice: the first before tokens are sorted,
the second, being linear, after the choices of a token are summed. What this saves is bytes: on CPU the additions in
between, bound by memory, make it 1.3 times as slow as plain experts in float32, 1.5 times in bfloat16.
Letters: T tokens, K choices of each, P the rows sorted by expert, E experts, D hidden, F expert width, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pikv_core.errors import UsageError
from pikv_core.moe.experts import (
    Experts,
    check_backend,
    choose_backend,
    compute_dtype,
    dense_sum,
    grouped_linear,
    sort_by_expert,
    swiglu,
)

# grouped_mm on CUDA wants rows of whole 16 bytes; ranks are filled up with zeros to a multiple of this.
RANK_GRAIN = 8


class LoRAExperts(nn.Module):
    """E feed-forward blocks whose weights are W + (alpha/rank)·B_e·A_e, W shared and B_e zero at first.

    train_base: whether W learns too. backend: as of Experts.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        expert_size: int,
        rank: int,
        alpha: float = 1.0,
        train_base: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        check_backend(backend)
        if rank < 1:
            raise UsageError(f"rank: expected a whole number of at least 1, got {rank}")
        self.num_experts = num_experts
        self.backend = backend
        self.scaling = alpha / rank
        self.train_base = train_base
        self.gate_up_proj = nn.Parameter(torch.empty(2 * expert_size, hidden_size), requires_grad=train_base)
        self.down_proj = nn.Parameter(torch.empty(hidden_size, expert_size), requires_grad=train_base)
        self.gate_up_A = nn.Parameter(torch.empty(num_experts, rank, hidden_size))
        self.gate_up_B = nn.Parameter(torch.zeros(num_experts, 2 * expert_size, rank))
        self.down_A = nn.Parameter(torch.empty(num_experts, rank, expert_size))
        self.down_B = nn.Parameter(torch.zeros(num_experts, hidden_size, rank))
        for weight in (self.gate_up_proj, self.gate_up_A, self.down_proj, self.down_A):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Return Σ_k weights[t, k]·expert[experts[t, k]](x[t]) for x [T, D]."""
        dtype, backend = compute_dtype(x), self.chosen_backend(x.device)
        x_TD = x.to(dtype)
        base_gate_up, base_down = self._base()
        with torch.autocast(x.device.type, enabled=False):
            if backend == "reference":
                gate_up, down = self._merged_weights()
                return dense_sum(x_TD, weights, experts, gate_up.to(dtype), down.to(dtype)).to(x.dtype)
            choices_P, places_N, rows_E = sort_by_expert(experts, self.num_experts, backend)
            tokens_P = choices_P // experts.shape[1]
            shared_PF = F.linear(x_TD, base_gate_up.to(dtype)).index_select(0, tokens_P)
            sorted_PD = x_TD.index_select(0, tokens_P)
            hidden_PF = swiglu(shared_PF + self._low_rank(sorted_PD, self.gate_up_A, self.gate_up_B, rows_E))
            # What follows is linear, so the choice's weight may come before it.
            hidden_PF = hidden_PF * weights.to(dtype).reshape(-1)[choices_P, None]
            own_PD = self._low_rank(hidden_PF, self.down_A, self.down_B, rows_E)
            shared_TD = F.linear(_sum_choices(hidden_PF, places_N, experts.shape), base_down.to(dtype))
            return (shared_TD + _sum_choices(own_PD, places_N, experts.shape)).to(x.dtype)

    def chosen_backend(self, device: torch.device) -> str:
        """Return the backend that runs on a device."""
        return choose_backend(self.backend, device)

    @torch.no_grad()
    def merged(self) -> Experts:
        """Return plain experts with the same outputs, each with whole weights of its own."""
        hidden_size, expert_size = self.down_proj.shape
        with torch.device("meta"):
            experts = Experts(self.num_experts, hidden_size, expert_size, self.backend)
        gate_up, down = self._merged_weights()
        experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
        return experts

    def get_stats(self) -> dict[str, int]:
        """Return the bytes of the shared weights, and those that the experts have beside."""
        adapter = (self.gate_up_A, self.gate_up_B, self.down_A, self.down_B)
        return {
            "expert_bytes": self.gate_up_proj.nbytes + self.down_proj.nbytes,
            "adapter_bytes": sum(weight.nbytes for weight in adapter),
        }

    def _merged_weights(self) -> tuple[Tensor, Tensor]:
        gate_up, down = self._base()
        gate_up_EFD = gate_up + self.scaling * self.gate_up_B @ self.gate_up_A
        return gate_up_EFD, down + self.scaling * self.down_B @ self.down_A

    def _base(self) -> tuple[Tensor, Tensor]:
        """Return the shared weights; where they are not to learn they get no gradient, however they were loaded."""
        weights = (self.gate_up_proj, self.down_proj)
        return weights if self.train_base else (weights[0].detach(), weights[1].detach())

    def _low_rank(self, x_PI: Tensor, A_ERI: Tensor, B_EOR: Tensor, rows_E: Tensor) -> Tensor:
        """Return (alpha/rank)·B_e·A_e·x [P, O] for rows sorted by expert."""
        A_ERI, B_EOR = A_ERI.to(x_PI.dtype), self.scaling * B_EOR.to(x_PI.dtype)
        if self.chosen_backend(x_PI.device) == "loop":
            parts = zip(x_PI.split(rows_E.tolist()), A_ERI.unbind(0), B_EOR.unbind(0), strict=True)
            return torch.cat([F.linear(F.linear(x, A), B) for x, A, B in parts])
        missing = -A_ERI.shape[1] % RANK_GRAIN
        ends_E = rows_E.cumsum(0).to(torch.int32)
        low_PR = grouped_linear(x_PI, F.pad(A_ERI, (0, 0, 0, missing)), ends_E)
        return grouped_linear(low_PR, F.pad(B_EOR, (0, missing)), ends_E)


def _sum_choices(rows_PI: Tensor, places_N: Tensor, shape_TK: torch.Size) -> Tensor:
    """Return [T, I]: the sum of each token's rows."""
    return rows_PI.index_select(0, places_N).view(*shape_TK, rows_PI.shape[-1]).sum(1)
