"""SwiGLU experts on rows sorted by expert, as one function: a product for each expert, written into its slice.

A choice's weight goes into the activation, which is linear in what follows, so that the outputs of a token are a plain
sum. Nothing of the activation is kept: the backward pass computes it again.
Letters: T tokens, K choices of each, N = T·K, P the rows sorted by expert, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_experts(
    x: Tensor, weights: Tensor, choices: Tensor, places: Tensor, num_rows: list[int], gate_up: Tensor, down: Tensor
) -> Tensor:
    """Return Σ_k weights[t, k]·down[e]·(silu(gate[e]·x[t])·up[e]·x[t]) [T, D], e the expert of choice t·K + k.

    x: [T, D]. weights: [T, K], float32 or wider. choices: the choice in each row [P]; places: the row of each choice
    [N]; num_rows: of each expert, in order; rows that are no choice's place are read by none. gate_up: [E, 2·F, D];
    down: [E, D, F].
    """
    return _SwiGLUExperts.apply(x, weights, choices, places, num_rows, gate_up, down)


def swiglu_experts_reference(
    x: Tensor, weights: Tensor, choices: Tensor, places: Tensor, num_rows: list[int], gate_up: Tensor, down: Tensor
) -> Tensor:
    """Return what `swiglu_experts` does: its definition."""
    expert_P = torch.arange(len(num_rows), device=x.device).repeat_interleave(torch.tensor(num_rows, device=x.device))
    expert_N = expert_P[places]
    x_ND = x.repeat_interleave(weights.shape[1], 0)
    gate_NF, up_NF = torch.einsum("nd,nfd->nf", x_ND, gate_up[expert_N]).chunk(2, -1)
    y_ND = torch.einsum("nf,ndf->nd", F.silu(gate_NF) * up_NF, down[expert_N])
    return (y_ND.view(*weights.shape, x.shape[1]) * weights[..., None]).sum(1).to(x.dtype)


class _SwiGLUExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        choices_P: Tensor,
        places_N: Tensor,
        num_rows: list[int],
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        places_TK = places_N.view_as(weights_TK)
        tokens_P = choices_P // max(1, weights_TK.shape[1])
        factor_P1 = _by_row(weights_TK, places_N, len(choices_P)).to(x_TD.dtype)
        y_PD = x_TD.new_empty(len(choices_P), x_TD.shape[1])
        parts = (one.split(num_rows) for one in (tokens_P, factor_P1, y_PD))
        kept = []  # a tensor for each expert: memory for all at once, beyond 32 MiB, would be new to glibc every time
        for tokens, factor, y, first, second in zip(*parts, gate_up.mT, down.mT, strict=True):
            kept.append(torch.mm(x_TD.index_select(0, tokens), first))
            gate, up = kept[-1].chunk(2, -1)
            torch.mm(F.silu(gate).mul_(up).mul_(factor), second, out=y)
        ctx.save_for_backward(x_TD, weights_TK, tokens_P, places_N, gate_up, down, *kept)
        ctx.num_rows = num_rows
        return _sum_choices(y_PD, places_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, tokens_P, places_N, gate_up, down, *kept = ctx.saved_tensors
        weight_P1 = _by_row(weights_TK, places_N, len(tokens_P))
        factor_P1, d_weight_P1 = weight_P1.to(x_TD.dtype), torch.empty_like(weight_P1)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        d_x_PD = x_TD.new_empty(len(tokens_P), x_TD.shape[1])
        # What an expert needs lies in the same memory as what the last one needed, which is in the core's caches.
        scratch = x_TD.new_empty(3, max(ctx.num_rows, default=0), down.shape[2])
        scratch_2F = x_TD.new_empty(scratch.shape[1], gate_up.shape[1])
        parts = (one.split(ctx.num_rows) for one in (tokens_P, factor_P1, d_weight_P1, d_x_PD))
        weights = (one.unbind(0) for one in (gate_up, down, d_gate_up, d_down))
        for hidden, tokens, factor, d_weight, d_x, first, second, d_first, d_second in zip(
            kept, *parts, *weights, strict=True
        ):
            x, d_y = x_TD.index_select(0, tokens), d_y_TD.index_select(0, tokens)
            (silu, active, d_active), d_hidden = scratch[:, : len(tokens)], scratch_2F[: len(tokens)]
            (gate, up), (d_gate, d_up) = hidden.chunk(2, -1), d_hidden.chunk(2, -1)
            torch.mm(d_y, second, out=d_active)
            torch.ops.aten.silu.out(gate, out=silu)
            torch.mul(silu, up, out=active)
            torch.sum(torch.mul(d_active, active, out=d_gate), -1, keepdim=True, dtype=d_weight.dtype, out=d_weight)
            torch.mm(d_y.mT, active.mul_(factor), out=d_second)
            torch.mul(d_active.mul_(factor), silu, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_active.mul_(up), gate, grad_input=d_gate)
            torch.mm(d_hidden.mT, x, out=d_first)
            torch.mm(d_hidden, first, out=d_x)
        d_weights_TK = d_weight_P1.index_select(0, places_N).view_as(weights_TK)
        return _sum_choices(d_x_PD, places_N.view_as(weights_TK)), d_weights_TK, None, None, None, d_gate_up, d_down


def _by_row(weights_TK: Tensor, places_N: Tensor, num_rows: int) -> Tensor:
    """Return [P, 1]: the weight of each row's choice, 0 where a row is no choice's place."""
    return weights_TK.new_zeros(num_rows, 1).index_copy_(0, places_N, weights_TK.reshape(-1, 1))


def _sum_choices(rows_PD: Tensor, places_TK: Tensor) -> Tensor:
    return F.embedding_bag(places_TK, rows_PD, mode="sum")
