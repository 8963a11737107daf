"""Asymmetric round-to-nearest quantisation, with float16 scale and zero point per group (KIVI, arXiv 2402.02750).

`quantize` does it along any dimension, `quantize_kv` makes the codes of a store: keys per channel over the tokens of a
unit, values per token over groups of channels. Shapes: B batch, G key/value heads, U units of T tokens, S = U·T, D
channels of a key, V of a value in C groups.
"""

from __future__ import annotations

import torch

from pikv_kernels.backends import choose, jit, tl, triton
from pikv_kernels.pack_bits import pack
from pikv_kernels.split_tokens import next_power

# Of a program. A thread has few columns of many rows: what is computed for a group, every thread that has it computes.
KEY_CHANNELS = 64
VALUE_TOKENS = 32


def quantize_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    bits: int,
    unit_tokens: int,
    group_channels: int,
    backend: str | None = None,
) -> dict[str, torch.Tensor]:
    """Quantise keys [B,G,S,D] and values [B,G,S,V] in one pass; S a multiple of `unit_tokens`, V of `group_channels`.

    Returns packed key_codes [B,G,U,D,·] with float16 key_scale and key_zero [B,G,U,D], value_codes [B,G,U,T,·] with
    value_scale and value_zero [B,G,U,T,C]; a number is code · scale + zero. Scale or zero is not finite where a value
    is not. The kernels' codes may differ from the definition's by one where a number lies halfway between two.
    """
    hindrance = _what_hinders(values.shape[3], bits, unit_tokens, group_channels)
    if choose("quantize_kv", keys, backend, hindrance) == "triton":
        return _quantize_on_gpu(keys, values, bits, unit_tokens, group_channels)
    keys, values = (x.unflatten(2, (-1, unit_tokens)) for x in (keys, values))
    # Channel-major keys: the scale of a channel is shared by a contiguous run of tokens.
    key_codes, key_scale, key_zero = quantize(keys.transpose(-1, -2), dim=-1, bits=bits)
    value_codes, value_scale, value_zero = quantize(values.unflatten(-1, (-1, group_channels)), dim=-1, bits=bits)
    return {
        "key_codes": pack(key_codes, bits),
        "key_scale": key_scale.squeeze(-1),
        "key_zero": key_zero.squeeze(-1),
        "value_codes": pack(value_codes.flatten(-2), bits),
        "value_scale": value_scale.squeeze(-1),
        "value_zero": value_zero.squeeze(-1),
    }


def _what_hinders(channels: int, bits: int, unit_tokens: int, group_channels: int) -> str | None:
    if bits not in (2, 4, 8):
        return f"no kernel for codes of {bits} bits"
    if unit_tokens not in (16, 32, 64, 128):
        return f"no kernel for units of {unit_tokens} tokens"
    groups = channels // group_channels
    if channels % 2 or (groups > 1 and groups % 2):
        return f"no kernel for {groups} groups of {channels} channels"
    return None


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
    keys, codes, scale, zero, G, stride_b, stride_g, stride_t,
    D: tl.constexpr, T: tl.constexpr, CHANNELS: tl.constexpr, BITS: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    # One program a key/value head, unit and block of channels.
    HALF: tl.constexpr = T // 2
    head = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1)
    row, channel = tl.arange(0, HALF), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    there = (row >= 0)[:, None] & inside[None, :]
    keys += head // G * stride_b + head % G * stride_g
    rows = keys + (unit * T + row[:, None]) * stride_t + channel[None, :]
    early = tl.load(rows, mask=there, other=0.0).to(tl.float32)
    late = tl.load(rows + HALF * stride_t, mask=there, other=0.0).to(tl.float32)
    lowest = tl.min(tl.minimum(_finite_or_low(early), _finite_or_low(late)), 0)
    highest = tl.max(tl.maximum(_finite_or_low(early), _finite_or_low(late)), 0)
    own_scale, own_zero = _group(lowest, highest, HIGHEST)
    at = (head * tl.num_programs(1) + unit) * D + channel
    tl.store(scale + at, own_scale, mask=inside)
    tl.store(zero + at, own_zero, mask=inside)
    codes += at[None, :] * (T * BITS // 8) + row[:, None]
    early_codes = _codes(early, own_scale[None, :], own_zero[None, :])
    late_codes = _codes(late, own_scale[None, :], own_zero[None, :])
    _store_codes(codes, early_codes, late_codes, there, HALF, BITS)


@jit
def _quantize_values(
    values, codes, scale, zero, num_tokens, G, stride_b, stride_g, stride_t,
    V: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, BITS: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    # One program a key/value head and block of tokens, whose halves are groups of WIDTH channels each.
    HALF: tl.constexpr = V // 2
    head = tl.program_id(0).to(tl.int64)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    group, column = tl.arange(0, GROUPS)[None, :, None], tl.arange(0, COLUMNS)[None, None, :]
    channel = group * WIDTH + column
    inside = (column < WIDTH) & (group * WIDTH < HALF)
    there = (token < num_tokens) & inside
    values += head // G * stride_b + head % G * stride_g
    rows = values + token * stride_t + channel
    low = tl.load(rows, mask=there, other=0.0).to(tl.float32)
    high = tl.load(rows + HALF, mask=there, other=0.0).to(tl.float32)
    low_least = tl.min(tl.where(inside, _finite_or_low(low), float("inf")), 2, keep_dims=True)
    low_most = tl.max(tl.where(inside, _finite_or_low(low), float("-inf")), 2, keep_dims=True)
    high_least = tl.min(tl.where(inside, _finite_or_low(high), float("inf")), 2, keep_dims=True)
    high_most = tl.max(tl.where(inside, _finite_or_low(high), float("-inf")), 2, keep_dims=True)
    at = (head * num_tokens + token) * C + group
    stored = (token < num_tokens) & (group * WIDTH < HALF)
    if C == 1:
        low_scale, low_zero = _group(tl.minimum(low_least, high_least), tl.maximum(low_most, high_most), HIGHEST)
        high_scale, high_zero = low_scale, low_zero
    else:
        low_scale, low_zero = _group(low_least, low_most, HIGHEST)
        high_scale, high_zero = _group(high_least, high_most, HIGHEST)
        tl.store(scale + at + C // 2, high_scale, mask=stored)
        tl.store(zero + at + C // 2, high_zero, mask=stored)
    tl.store(scale + at, low_scale, mask=stored)
    tl.store(zero + at, low_zero, mask=stored)
    low_codes, high_codes = _codes(low, low_scale, low_zero), _codes(high, high_scale, high_zero)
    codes += (head * num_tokens + token) * (V * BITS // 8) + channel
    _store_codes(codes, low_codes, high_codes, there, HALF, BITS)


def _quantize_on_gpu(
    keys: torch.Tensor, values: torch.Tensor, bits: int, unit_tokens: int, group_channels: int
) -> dict[str, torch.Tensor]:
    B, G, S, D = keys.shape
    T, V = unit_tokens, values.shape[3]
    U, C = S // T, V // group_channels
    stored = 8 if bits == 2 else bits  # codes of 2 bits are packed afterwards
    sizes = {"BITS": stored, "HIGHEST": 2.0**bits - 1.0}
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))

    def empty(*last: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return keys.new_empty(B, G, U, *last, dtype=dtype)

    codes = {
        "key_codes": empty(D, T * stored // 8, dtype=torch.uint8),
        "key_scale": empty(D),
        "key_zero": empty(D),
        "value_codes": empty(T, V * stored // 8, dtype=torch.uint8),
        "value_scale": empty(T, C),
        "value_zero": empty(T, C),
    }
    of_keys, of_values = ([codes[f"{kind}_{part}"] for part in ("codes", "scale", "zero")] for kind in ("key", "value"))
    if B * G * U:
        _quantize_keys[(B * G, U, triton.cdiv(D, KEY_CHANNELS))](
            keys, *of_keys, G, *keys.stride()[:3], D=D, T=T, CHANNELS=KEY_CHANNELS, **sizes, num_warps=max(1, T // 32)
        )
        width = min(group_channels, V // 2)
        _quantize_values[(B * G, triton.cdiv(S, VALUE_TOKENS))](
            values, *of_values, S, G, *values.stride()[:3],
            V=V, C=C, WIDTH=width, GROUPS=next_power(V // 2 // width), COLUMNS=next_power(width),
            TOKENS=VALUE_TOKENS, **sizes, num_warps=max(1, next_power(V) // 64),
        )  # fmt: skip
    if stored != bits:
        codes |= {name: pack(codes[name], bits) for name in ("key_codes", "value_codes")}
    return codes
