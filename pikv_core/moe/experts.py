"""SwiGLU experts in stacked weights, none dropping a token: sort by expert, one product per expert.

Letters: T tokens, K choices, N = T·K choices sorted by expert, E experts, D hidden, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pikv_core.errors import UsageError

BACKENDS = ("loop", "grouped_mm", "reference")


class Experts(nn.Module):
    """E feed-forward blocks down(silu(gate(x))·up(x)), stacked as in transformers' Mixtral.

    backend: "loop" (one product per expert, for CPU), "grouped_mm" (one kernel for all, for CUDA),
    "reference" (every expert on every token, the definition) or "auto", which takes the first two by device.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int, backend: str = "auto"):
        super().__init__()
        if backend not in (*BACKENDS, "auto"):
            raise UsageError(
                f"unknown expert backend '{backend}'", hint=f"backend is one of: auto, {', '.join(BACKENDS)}"
            )
        self.num_experts = num_experts
        self.backend = backend
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=expert_size**-0.5)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Return Σ_k weights[t, k]·expert[experts[t, k]](x[t]) for x [T, D]."""
        dtype = _compute_dtype(x)
        x_TD, gate_up, down = x.to(dtype), self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.chosen_backend(x.device) == "reference":
                return _reference(x_TD, weights, experts, gate_up, down).to(x.dtype)
            order_N = experts.reshape(-1).argsort(stable=True)
            counts = torch.bincount(experts.reshape(-1), minlength=self.num_experts)
            sorted_ND = x_TD.index_select(0, order_N // experts.shape[1])
            if self.chosen_backend(x.device) == "loop":
                out_ND = _loop(sorted_ND, counts.tolist(), gate_up, down)
            else:
                out_ND = _grouped(sorted_ND, counts.cumsum(0).to(torch.int32), gate_up, down)
            out_TKD = out_ND.index_select(0, _inverse(order_N)).view(*experts.shape, x.shape[-1])
            return (out_TKD * weights[..., None]).sum(1).to(x.dtype)

    def chosen_backend(self, device: torch.device) -> str:
        """Return the backend that runs on a device."""
        if self.backend != "auto":
            return self.backend
        return "grouped_mm" if device.type == "cuda" else "loop"


def _loop(x_ND: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    # unbind's backward stacks the experts' gradients once; indexing would add E gradients of full size.
    rows = zip(x_ND.split(counts), gate_up.unbind(0), down.unbind(0), strict=True)
    return torch.cat([F.linear(_swiglu(F.linear(x, first)), second) for x, first, second in rows])


def _grouped(x_ND: Tensor, ends_E: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    hidden = _swiglu(grouped_mm(x_ND, gate_up.transpose(1, 2), offs=ends_E))
    return grouped_mm(hidden, down.transpose(1, 2), offs=ends_E)


def _reference(x_TD: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    hidden_ETF = _swiglu(torch.einsum("td,efd->etf", x_TD, gate_up))
    out_ETD = torch.einsum("etf,edf->etd", hidden_ETF, down)
    dense_TE = weights.new_zeros(len(x_TD), len(down)).scatter_add(1, experts, weights)
    return torch.einsum("etd,te->td", out_ETD.to(weights.dtype), dense_TE)


def _swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def _compute_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
