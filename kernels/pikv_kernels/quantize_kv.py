"""Asymmetric round-to-nearest quantisation, with float16 scale and zero point per group (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

import torch


def quantize(values: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes below 2^bits (the shape of `values`), scale and zero (float16, `dim` of length 1).

    A group is all values along `dim`; values = codes · scale + zero, to within half a scale. bits: 1 to 16; codes are
    uint8 up to 8 bits, int32 above. Scale or zero is not finite where a value is not, or leaves float16's range.
    """
    highest_code = 2**bits - 1
    exact = values.float()
    zero = _rounded(exact.amin(dim, keepdim=True), -torch.inf)
    span = exact.amax(dim, keepdim=True) - zero.float()
    scale = _rounded((span / highest_code).clamp(min=2.0**-24), torch.inf)
    codes = (exact - zero.float()).div_(scale.float()).round_().clamp_(0, highest_code)
    return codes.to(torch.uint8 if bits <= 8 else torch.int32), scale, zero


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return codes · scale + zero in `dtype`, computed in float32."""
    return codes.float().mul_(scale.float()).add_(zero.float()).to(dtype)


def _rounded(exact: torch.Tensor, towards: float) -> torch.Tensor:
    """Round to float16 in one direction, so that no value of the group falls outside the codes."""
    near = exact.to(torch.float16)
    beyond = near.float() < exact if towards > 0 else near.float() > exact
    return torch.where(beyond, torch.nextafter(near, near.new_tensor(towards)), near)
