"""SwiGLU experts in stacked weights, none dropping a token: sort by expert, one product per expert.

Letters: T tokens, K choices of each, N = T·K, P the rows sorted by expert, E experts, D hidden, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pikv_core.errors import UsageError
from pikv_kernels.swiglu_experts import swiglu_experts

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
        check_backend(backend)
        self.num_experts = num_experts
        self.backend = backend
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=expert_size**-0.5)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Return Σ_k weights[t, k]·expert[experts[t, k]](x[t]) for x [T, D]."""
        dtype, backend = compute_dtype(x), self.chosen_backend(x.device)
        x_TD, gate_up, down = x.to(dtype), self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if backend == "reference":
                return dense_sum(x_TD, weights, experts, gate_up, down).to(x.dtype)
            choices_P, places_N, rows_E = sort_by_expert(experts, self.num_experts, backend)
            if backend == "loop":
                sort = choices_P, places_N, rows_E.tolist()
                return swiglu_experts(x_TD, weights, *sort, gate_up, down).to(x.dtype)
            sorted_PD = x_TD.index_select(0, choices_P // experts.shape[1])
            out_PD = _grouped(sorted_PD, rows_E.cumsum(0).to(torch.int32), gate_up, down)
            out_TKD = out_PD.index_select(0, places_N).view(*experts.shape, x.shape[-1])
            return (out_TKD * weights[..., None]).sum(1).to(x.dtype)

    def chosen_backend(self, device: torch.device) -> str:
        """Return the backend that runs on a device."""
        return choose_backend(self.backend, device)

    def get_stats(self) -> dict[str, int]:
        """Return the bytes of the weights."""
        return {"expert_bytes": self.gate_up_proj.nbytes + self.down_proj.nbytes}


def check_backend(backend: str) -> None:
    """Raise UsageError for a backend that does not exist."""
    if backend not in (*BACKENDS, "auto"):
        raise UsageError(f"unknown expert backend '{backend}'", hint=f"backend is one of: auto, {', '.join(BACKENDS)}")


def choose_backend(backend: str, device: torch.device) -> str:
    """Return `backend`, or for "auto" the one for this device."""
    if backend != "auto":
        return backend
    return "grouped_mm" if device.type == "cuda" else "loop"


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that experts compute in: that of autocast where it is on, else that of x."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate)·up [..., F] of the two halves of [..., 2·F]."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def sort_by_expert(experts_TK: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the choice t·K + k in each sorted row [P], the row of each choice [N], the rows of each expert [E].

    For the loop, with tokens enough, an expert's rows are a multiple of GRAIN; what fills them up repeats
    choice 0 and is read by none.
    """
    experts_N = experts_TK.reshape(-1)
    num_choices = len(experts_N)
    grain = GRAIN if backend == "loop" and num_choices >= GRAIN * num_experts else 1
    order_N = experts_N.argsort(stable=True)
    counts_E = experts_N.new_zeros(num_experts).scatter_add_(0, experts_N, torch.ones_like(experts_N))
    rows_N, rows_E, choices_P = torch.arange(num_choices, device=experts_N.device), counts_E, order_N
    if grain > 1:
        rows_E = (counts_E + grain - 1) // grain * grain
        filled_before_E = (rows_E - counts_E).cumsum(0) - (rows_E - counts_E)
        rows_N = rows_N + filled_before_E[experts_N[order_N]]
        choices_P = order_N.new_zeros(int(rows_E.sum()))
        choices_P[rows_N] = order_N
    places_N = torch.empty_like(order_N)
    places_N[order_N] = rows_N
    return choices_P, places_N, rows_E


def grouped_linear(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Return each expert's product [P, O] with its own rows, which end before ends_E, in one kernel."""
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return grouped_mm(x_PI, weight_EOI.transpose(1, 2), offs=ends_E)


def dense_sum(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return the weighted sum over experts from every expert's output of every token: the definition."""
    hidden_ETF = swiglu(torch.einsum("td,efd->etf", x_TD, gate_up))
    out_ETD = torch.einsum("etf,edf->etd", hidden_ETF, down)
    dense_TE = weights_TK.new_zeros(len(x_TD), len(down)).scatter_add(1, experts_TK, weights_TK)
    dtype = torch.promote_types(out_ETD.dtype, dense_TE.dtype)
    return torch.einsum("etd,te->td", out_ETD.to(dtype), dense_TE.to(dtype))


def _grouped(x_PD: Tensor, ends_E: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return grouped_linear(swiglu(grouped_linear(x_PD, gate_up, ends_E)), down, ends_E)
