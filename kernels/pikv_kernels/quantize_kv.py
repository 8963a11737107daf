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
    zero = _rounded(low, -torch.inf)
    scale = _rounded(((exact.amax(dim, keepdim=True) - zero.float()) / LEVELS).clamp(min=2.0**-24), torch.inf)
    codes = ((exact - zero.float()) / scale.float()).round().clamp(0, LEVELS)
    return codes.to(torch.uint8), scale, zero


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return codes · scale + zero in `dtype`, computed in float32."""
    return torch.addcmul(zero.float(), codes.float(), scale.float()).to(dtype)


def _rounded(exact: torch.Tensor, towards: float) -> torch.Tensor:
    """Round to float16 in one direction, so that no value of the group falls outside the codes."""
    near = exact.to(torch.float16)
    beyond = near.float() < exact if towards > 0 else near.float() > exact
    return torch.where(beyond, torch.nextafter(near, near.new_tensor(towards)), near)
