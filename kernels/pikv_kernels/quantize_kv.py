"""Asymmetric round-to-nearest quantisation, with float16 scale and zero point per group (KIVI, arXiv 2402.02750).

`quantize` does it along any dimension. `quantize_kv` makes the store that `decode_attention` reads: keys per channel
over 64 tokens, values per token over halves of the channels. Shapes: B batch, G key/value heads, S tokens, U = S/64,
D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pikv_kernels.backends import choose, jit, tl
from pikv_kernels.pack_bits import pack, unpack
from pikv_kernels.split_tokens import next_power

GROUP_TOKENS = 64
KEY_ROWS = 4  # read at a time


class QuantizedKV(NamedTuple):
    """Codes of 8 or 4 bits: bytes [B,G,S,D·bits/8], at 4 bits channels d and d + D/2 in byte d.

    Key scale and zero are float16 [B,G,U,D], those of values [B,G,S,2]; a number is code · scale + zero.
    """

    key_codes: torch.Tensor
    key_scale: torch.Tensor
    key_zero: torch.Tensor
    value_codes: torch.Tensor
    value_scale: torch.Tensor
    value_zero: torch.Tensor

    @property
    def bits(self) -> int:
        return 8 * self.key_codes.shape[-1] // self.key_scale.shape[-1]


def quantize_kv(keys: torch.Tensor, values: torch.Tensor, bits: int, backend: str | None = None) -> QuantizedKV:
    """Quantise keys and values [B,G,S,D], S a multiple of 64 and D of 4, in one pass; bits: 8 or 4.

    Scale or zero is not finite where a value is not. The kernel's codes may differ from the definition's by one where
    a number lies halfway between two.
    """
    assert bits in (4, 8) and keys.shape[2] % GROUP_TOKENS == 0 and keys.shape[3] % 4 == 0
    if choose("quantize_kv", keys, backend) == "triton":
        return _quantize_on_gpu(keys, values, bits)
    key_codes, key_scale, key_zero = quantize(keys.unflatten(2, (-1, GROUP_TOKENS)), dim=3, bits=bits)
    value_codes, value_scale, value_zero = quantize(values.unflatten(-1, (2, -1)), dim=-1, bits=bits)
    return QuantizedKV(
        pack(key_codes.flatten(2, 3), bits), key_scale.squeeze(3), key_zero.squeeze(3),
        pack(value_codes.flatten(-2), bits), value_scale.squeeze(-1), value_zero.squeeze(-1),
    )  # fmt: skip


def dequantize_kv(store: QuantizedKV, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [B,G,S,D] in `dtype`, computed in float32."""
    key_codes = unpack(store.key_codes, store.bits).unflatten(2, (-1, GROUP_TOKENS))
    value_codes = unpack(store.value_codes, store.bits).unflatten(-1, (2, -1))
    keys = dequantize(key_codes, store.key_scale[:, :, :, None], store.key_zero[:, :, :, None], dtype)
    values = dequantize(value_codes, store.value_scale[..., None], store.value_zero[..., None], dtype)
    return keys.flatten(2, 3), values.flatten(-2)


def quantize(values: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes below 2^bits (the shape of `values`), scale and zero (float16, `dim` of length 1).

    A group is all values along `dim`; values = codes · scale + zero, to within half a scale. bits: 1 to 16; codes are
    uint8 up to 8 bits, int32 above. Scale or zero is not finite where a value is not, or leaves float16's range.
    """
    highest_code = 2**bits - 1
    exact = values.float()
    zero = _rounded(exact.amin(dim, keepdim=True), -torch.inf)
    span = exact.amax(dim, keepdim=True) - zero.float()
    # By a tensor: a GPU multiplies by the inverse of a Python number, and scales would depend on the device.
    scale = _rounded((span / span.new_full((), highest_code)).clamp(min=2.0**-24), torch.inf)
    codes = (exact - zero.float()).div_(scale.float()).round_().clamp_(0, highest_code)
    return codes.to(torch.uint8 if bits <= 8 else torch.int32), scale, zero


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return codes · scale + zero in `dtype`, computed in float32."""
    return codes.float().mul_(scale.float()).add_(zero.float()).to(dtype)


def _rounded(exact: torch.Tensor, towards: float) -> torch.Tensor:
    """Round to float16 in one direction, so that no value of the group falls outside the codes."""
    near = exact.to(torch.float16)
    # By its bits, since not every device has float16's nextafter: those below zero count away from it.
    bits = near.view(torch.int16)
    if towards > 0:
        beyond = near.float() < exact
        neighbour = torch.where(bits < 0, bits - 1, bits + 1).masked_fill_(near == 0, 1)
    else:
        beyond = near.float() > exact
        neighbour = torch.where(bits < 0, bits + 1, bits - 1).masked_fill_(near == 0, -(2**15) + 1)
    return torch.where(beyond, neighbour, bits).view(torch.float16)


@jit
def _to_half(exact, UP: tl.constexpr):
    """Round float32 to float16 towards +inf or -inf, as `_rounded` does."""
    near = exact.to(tl.float16)
    bits = near.to(tl.int16, bitcast=True)
    if UP:  # of positive numbers
        beyond, neighbour = near.to(tl.float32) < exact, bits + 1
    else:
        beyond = near.to(tl.float32) > exact
        # 0x8001 is the first number below zero; as signed integers, numbers below zero count upwards.
        neighbour = tl.where(near == 0.0, -32767, tl.where(bits < 0, bits + 1, bits - 1))
    return tl.where(beyond, neighbour, bits).to(tl.int16).to(tl.float16, bitcast=True)


@jit
def _finite_or_low(x):
    """Return numbers with -inf for NaN, which `min` and `max` would pass over."""
    return tl.where(x == x, x, float("-inf"))


@jit
def _group(lowest, highest, HIGHEST_CODE: tl.constexpr):
    """Return float16 scale and zero of groups; either is not finite where a number is not."""
    zero = _to_half(lowest, UP=False)
    span = highest - zero.to(tl.float32)
    return _to_half(tl.maximum(tl.div_rn(span, HIGHEST_CODE), 5.9604644775390625e-08), UP=True), zero


@jit
def _codes(x, scale, zero):
    """Return bytes of codes. Adding 1.5·2^23 rounds halves to even, and leaves whole numbers in the last bits."""
    steps = (x - zero.to(tl.float32)) * (1.0 / scale.to(tl.float32))
    return ((steps + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)


@jit
def _store_codes(codes, low, high, there, HALF: tl.constexpr, BITS: tl.constexpr):
    """Store the two halves' codes in one byte, or side by side."""
    if BITS == 4:
        tl.store(codes, low | (high << 4), mask=there)
    else:
        tl.store(codes, low, mask=there)
        tl.store(codes + HALF, high, mask=there)


@jit
def _quantize_keys(
    keys, codes, scale, zero, num_groups, G, stride_b, stride_g, stride_t,
    D: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # One program a key/value head and group of 64 tokens, read twice (from a cache the second time) in steps of a few
    # rows, so that a thread has few columns: what is computed for a column is computed by every thread that has it.
    head = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    HIGHEST: tl.constexpr = 2.0**BITS - 1.0
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = column < HALF
    there = (row >= 0)[:, None] & inside[None, :]
    keys += head // G * stride_b + head % G * stride_g
    rows = keys + (group * 64 + row[:, None]) * stride_t + column[None, :]
    lowest = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    highest = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    lowest_high, highest_high = lowest, highest
    for step in tl.static_range(64 // ROWS):
        low = _finite_or_low(tl.load(rows + step * ROWS * stride_t, mask=there, other=0.0).to(tl.float32))
        high = _finite_or_low(tl.load(rows + step * ROWS * stride_t + HALF, mask=there, other=0.0).to(tl.float32))
        lowest, highest = tl.minimum(lowest, low), tl.maximum(highest, low)
        lowest_high, highest_high = tl.minimum(lowest_high, high), tl.maximum(highest_high, high)
    low_scale, low_zero = _group(tl.min(lowest, 0), tl.max(highest, 0), HIGHEST)
    high_scale, high_zero = _group(tl.min(lowest_high, 0), tl.max(highest_high, 0), HIGHEST)
    at = (head * num_groups + group) * D + column
    tl.store(scale + at, low_scale, mask=inside)
    tl.store(zero + at, low_zero, mask=inside)
    tl.store(scale + at + HALF, high_scale, mask=inside)
    tl.store(zero + at + HALF, high_zero, mask=inside)
    codes += ((head * num_groups + group) * 64 + row[:, None]) * (D * BITS // 8) + column[None, :]
    for step in tl.static_range(64 // ROWS):
        low = tl.load(rows + step * ROWS * stride_t, mask=there, other=0.0).to(tl.float32)
        high = tl.load(rows + step * ROWS * stride_t + HALF, mask=there, other=0.0).to(tl.float32)
        low_codes = _codes(low, low_scale[None, :], low_zero[None, :])
        high_codes = _codes(high, high_scale[None, :], high_zero[None, :])
        _store_codes(codes + step * ROWS * (D * BITS // 8), low_codes, high_codes, there, HALF, BITS)


@jit
def _quantize_values(
    values, codes, scale, zero, num_groups, G, stride_b, stride_g, stride_t,
    D: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    # One program a key/value head and 64 tokens, in groups of the halves of a token's channels.
    head = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = D // 2
    HIGHEST: tl.constexpr = 2.0**BITS - 1.0
    token, column = tl.program_id(1) * 64 + tl.arange(0, 64), tl.arange(0, COLUMNS)
    inside = column < HALF
    there = (token >= 0)[:, None] & inside[None, :]
    values += head // G * stride_b + head % G * stride_g
    # Channels that are not there repeat the first, so that they widen no group.
    rows = values + token[:, None] * stride_t + tl.where(inside, column, 0)[None, :]
    low, high = tl.load(rows).to(tl.float32), tl.load(rows + HALF).to(tl.float32)
    whole = _finite_or_low(low)
    low_scale, low_zero = _group(tl.min(whole, 1), tl.max(whole, 1), HIGHEST)
    whole = _finite_or_low(high)
    high_scale, high_zero = _group(tl.min(whole, 1), tl.max(whole, 1), HIGHEST)
    at = (head * num_groups * 64 + token) * 2
    tl.store(scale + at, low_scale)
    tl.store(zero + at, low_zero)
    tl.store(scale + at + 1, high_scale)
    tl.store(zero + at + 1, high_zero)
    low_codes = _codes(low, low_scale[:, None], low_zero[:, None])
    high_codes = _codes(high, high_scale[:, None], high_zero[:, None])
    codes += (head * num_groups * 64 + token[:, None]) * (D * BITS // 8) + column[None, :]
    _store_codes(codes, low_codes, high_codes, there, HALF, BITS)


def _quantize_on_gpu(keys: torch.Tensor, values: torch.Tensor, bits: int) -> QuantizedKV:
    B, G, S, D = keys.shape
    U = S // GROUP_TOKENS
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    key_codes, value_codes = (keys.new_empty(B, G, S, D * bits // 8, dtype=torch.uint8) for _ in range(2))
    key_scale, key_zero = (keys.new_empty(B, G, U, D, dtype=torch.float16) for _ in range(2))
    value_scale, value_zero = (keys.new_empty(B, G, S, 2, dtype=torch.float16) for _ in range(2))
    if B * G * U:
        sizes = {"D": D, "COLUMNS": next_power(D // 2), "BITS": bits, "num_warps": 4}
        _quantize_keys[(B * G, U)](
            keys, key_codes, key_scale, key_zero, U, G, *keys.stride()[:3], **sizes, ROWS=KEY_ROWS
        )
        _quantize_values[(B * G, U)](values, value_codes, value_scale, value_zero, U, G, *values.stride()[:3], **sizes)
    return QuantizedKV(key_codes, key_scale, key_zero, value_codes, value_scale, value_zero)
