"""SwiGLU experts in stacked weights, none dropping a token: sort by expert, one product per expert.

Letters: T tokens, K choices of each, N = T·K, P the rows sorted by expert, E experts, D hidden, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pikv_core.errors import UsageError

BACKENDS = ("loop", "grouped_mm", "reference")

# A product in bfloat16 on CPU is compiled for its shape, 1.4 ms against 0.07 ms for one of 1024 rows by 128 by
# 256; so the loop rounds the rows of an expert up to a multiple of this, and the shapes come again.
GRAIN = 64


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
        dtype, backend = _compute_dtype(x), self.chosen_backend(x.device)
        x_TD, gate_up, down = x.to(dtype), self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if backend == "reference":
                return _reference(x_TD, weights, experts, gate_up, down).to(x.dtype)
            grain = GRAIN if backend == "loop" and experts.numel() >= GRAIN * self.num_experts else 1
            choices_P, places_N, rows_E = _sort(experts.reshape(-1), self.num_experts, grain)
            sorted_PD = x_TD.index_select(0, choices_P // experts.shape[1])
            if backend == "loop":
                out_PD = _loop(sorted_PD, rows_E.tolist(), gate_up, down)
            else:
                out_PD = _grouped(sorted_PD, rows_E.cumsum(0).to(torch.int32), gate_up, down)
            out_TKD = out_PD.index_select(0, places_N).view(*experts.shape, x.shape[-1])
            return (out_TKD * weights[..., None]).sum(1).to(x.dtype)

    def chosen_backend(self, device: torch.device) -> str:
        """Return the backend that runs on a device."""
        if self.backend != "auto":
            return self.backend
        return "grouped_mm" if device.type == "cuda" else "loop"


def _loop(x_PD: Tensor, num_rows: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    # unbind's backward stacks the experts' gradients once; indexing would add E gradients of full size.
    parts = zip(x_PD.split(num_rows), gate_up.unbind(0), down.unbind(0), strict=True)
    return torch.cat([F.linear(_swiglu(F.linear(x, first)), second) for x, first, second in parts])


def _grouped(x_PD: Tensor, ends_E: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    hidden = _swiglu(grouped_mm(x_PD, gate_up.transpose(1, 2), offs=ends_E))
    return grouped_mm(hidden, down.transpose(1, 2), offs=ends_E)


def _reference(x_TD: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    hidden_ETF = _swiglu(torch.einsum("td,efd->etf", x_TD, gate_up))
    out_ETD = torch.einsum("etf,edf->etd", hidden_ETF, down)
    dense_TE = weights.new_zeros(len(x_TD), len(down)).scatter_add(1, experts, weights)
    return torch.einsum("etd,te->td", out_ETD.to(weights.dtype), dense_TE)


def _swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _sort(experts_N: Tensor, num_experts: int, grain: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the choice in each sorted row [P], the row of each choice [N], and the rows of each expert [E].

    An expert's rows are a multiple of `grain`; what fills them up repeats choice 0 and is read by none.
    """
    order_N = experts_N.argsort(stable=True)
    counts_E = torch.bincount(experts_N, minlength=num_experts)
    rows_E = (counts_E + grain - 1) // grain * grain
    filled_before_E = (rows_E - counts_E).cumsum(0) - (rows_E - counts_E)
    num_choices = len(experts_N)
    rows_N = torch.arange(num_choices, device=experts_N.device) + filled_before_E[experts_N[order_N]]
    choices_P = order_N.new_zeros(num_choices if grain == 1 else int(rows_E.sum()))
    choices_P[rows_N] = order_N
    places_N = torch.empty_like(order_N)
    places_N[order_N] = rows_N
    return choices_P, places_N, rows_E


def _compute_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
