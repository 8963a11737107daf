"""RMS normalisation (1910.07467) with its gradient in few passes over memory; any device.

Shapes: N rows, D size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return weight·x / sqrt(mean x² + eps) over the last dimension of x [..., D], in `dtype`, by default that of x.

    Computed in float32 or wider, and rounded once; on CUDA by torch's own kernel, with the weight in the type of x.
    """
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).to(dtype or x.dtype)
    return _RMSNorm.apply(x, weight, eps, dtype or x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return what `rms_norm` does: its definition."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(dtype or x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide_ND = x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        norm_N1 = torch.linalg.vector_norm(wide_ND, dim=-1, keepdim=True)
        scale_N1 = norm_N1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale_N1)
        return (wide_ND * scale_N1).mul_(weight).to(dtype).view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale_N1 = ctx.saved_tensors
        wide_ND, d_ND = (one.flatten(0, -2).to(scale_N1.dtype) for one in (x, d_y))
        wide_weight = weight.to(scale_N1.dtype)
        both_ND = d_ND * wide_ND
        d_weight = torch.mv(both_ND.mT, scale_N1[:, 0])
        along_N1 = torch.mv(both_ND, wide_weight)[:, None] * scale_N1.pow(3) / x.shape[-1]
        d_x_ND = torch.mul(d_ND, wide_weight, out=both_ND).mul_(scale_N1).addcmul_(wide_ND, along_N1, value=-1)
        return d_x_ND.to(x.dtype).view_as(x), d_weight.to(weight.dtype), None, None
