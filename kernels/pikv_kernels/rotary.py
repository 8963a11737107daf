"""Rotary positions (2104.09864) with their gradient in few passes over memory; any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of x [..., D] by angles whose cos and sin broadcast to [..., D/2]; return like x.

    Computed in the type of cos, and rounded once; cos and sin learn nothing.
    """
    return _Rotate.apply(x, cos, sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what `rotate` does: its definition."""
    low, high = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([low * cos - high * sin, low * sin + high * cos], -1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(d_y, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    y = torch.empty_like(wide, memory_format=torch.contiguous_format)
    (low, high), (new_low, new_high) = wide.chunk(2, -1), y.chunk(2, -1)
    torch.mul(low, cos, out=new_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=new_high).addcmul_(low, sin)
    return y.to(x.dtype)
