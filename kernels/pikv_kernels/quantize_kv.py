"""Asymmetric round-to-nearest quantisation to bytes, with float16 scale and zero point per group (KIVI, 2402.02750)."""

from __future__ import annotations

import torch

LEVELS = 255


def quantize(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes (uint8, the shape of `values`), scale and zero (float16, `dim` of length 1).

    A group is all values along `dim`; values = codes · scale + zero, to within half a scale.
    """
    exact = values.float()
    low = exact.amin(dim, keepdim=True)
    zero = low.to(torch.float16)
    zero = torch.where(zero.float() > low, torch.nextafter(zero, zero.new_tensor(-torch.inf)), zero)
    scale = ((exact.amax(dim, keepdim=True) - zero.float()) / LEVELS).clamp(min=2.0**-24)
    scale = scale.to(torch.float16).clamp(min=2.0**-24)
    codes = ((exact - zero.float()) / scale.float()).round().clamp(0, LEVELS)
    return codes.to(torch.uint8), scale, zero


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return codes · scale + zero in `dtype`, computed in float32."""
    return torch.addcmul(zero.float(), codes.float(), scale.float()).to(dtype)
