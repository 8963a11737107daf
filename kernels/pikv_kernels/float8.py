"""Numbers of the 8-bit format e4m3 as float32; torch's own cast runs number by number on a CPU."""

from __future__ import annotations

import torch


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers for bytes (uint8) of e4m3, NaN not among them; exact."""
    if codes.device.type != "cpu":
        return codes.view(torch.float8_e4m3fn).float()
    # Shifted by 7 after the sign is extended, exponent and mantissa lie in float16's own fields, bit 14 aside; what is
    # left is the difference of the exponents' biases, 15 - 7.
    wide = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return wide.view(torch.float16).float().mul_(2.0**8)
