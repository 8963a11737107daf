"""KIVI's layout with 8-bit codes (arXiv 2402.02750): keys per channel over groups of tokens, values per token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec

if TYPE_CHECKING:
    import torch


@CODECS.register("int8")
@dataclass(frozen=True)
class Int8(Codec):
    """Store bytes and float16 scales and zero points; units are encoded once and never requantised.

    group: tokens of a key group, and channels of a value group (its divisor common with the head dim).
    residual: newest tokens kept in full precision before they are encoded.
    """

    group: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    residual: Annotated[int, Field(ge=0)] = 32

    @property
    def unit_tokens(self) -> int:
        return self.group

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        from pikv_kernels.quantize_kv import quantize

        B, G, N, D = keys.shape
        U, channels = N // self.group, math.gcd(self.group, D)
        # Channel-major key blocks: the scale of a channel is shared by a contiguous run of tokens.
        key_codes, key_scale, key_zero = quantize(keys.reshape(B, G, U, self.group, D).transpose(-1, -2), dim=-1)
        value_codes, value_scale, value_zero = quantize(
            values.reshape(B, G, U, self.group, D // channels, channels), dim=-1
        )
        return {
            "key_codes": key_codes,
            "key_scale": key_scale,
            "key_zero": key_zero,
            "value_codes": value_codes,
            "value_scale": value_scale,
            "value_zero": value_zero,
        }

    def decode(self, encoded: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        from pikv_kernels.quantize_kv import dequantize

        keys = dequantize(encoded["key_codes"], encoded["key_scale"], encoded["key_zero"], dtype)
        values = dequantize(encoded["value_codes"], encoded["value_scale"], encoded["value_zero"], dtype)
        B, G, U, D, tokens = keys.shape
        return keys.transpose(-1, -2).reshape(B, G, U * tokens, D), values.reshape(B, G, U * tokens, D)
