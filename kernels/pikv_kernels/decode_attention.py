"""Attention of one new token over a store of keys and values: full, 8-bit floats, or codes of 8 or 4 bits.

The kernels split the tokens over programs and merge by log-sum-exp (flash-decoding); this file's reads full precision,
e4m3 and pages of full precision, `decode_codes` the codes. Shapes: B batch, G key/value heads, R query heads of a
group, H = G·R, S stored tokens, D head dim, P pages, U units of tokens that share a scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pikv_kernels.backends import INTERPRETED, choose, constexpr, jit, tl
from pikv_kernels.decode_codes import decode_codes
from pikv_kernels.float8 import decode_e4m3
from pikv_kernels.partial_attention import partial_attention
from pikv_kernels.quantize_kv import QuantizedKV, dequantize_kv
from pikv_kernels.split_tokens import (
    LEAST_CHANNELS,
    LOG2E,
    Launch,
    dot,
    mask_strides,
    merge_splits,
    next_power,
    plan_splits,
)

# Each byte goes to the upper half of 16 bits; all but its sign is shifted by one.
FROM_E4M3 = constexpr("""{
    .reg .b32 low, high, low_rest, high_rest;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    shr.b32 low_rest, low, 1;
    shr.b32 high_rest, high, 1;
    and.b32 low_rest, low_rest, 0x3F803F80;
    and.b32 high_rest, high_rest, 0x3F803F80;
    lop3.b32 $0, low, 0x80008000, low_rest, 0xEA;
    lop3.b32 $1, high, 0x80008000, high_rest, 0xEA;
}""")
WHOLE = Launch(tile=64, num_warps=4, num_stages=3, programs_per_sm=3)
PAGES = Launch(tile=64, num_warps=2, num_stages=3, programs_per_sm=3)
WIDE = Launch(
    tile=32, num_warps=4, num_stages=3, programs_per_sm=3
)  # float32 and large heads, which take more registers
EXACT_ROWS = Launch(tile=32, num_warps=8, num_stages=3, programs_per_sm=3)  # float32 with many query heads of a group
LEAST_ROWS = 16  # of a product on the matrix units; those of float32 run on the ordinary ones


class FullKV(NamedTuple):
    """Keys and values [B,G,S,D] in float32, float16 or bfloat16."""

    keys: torch.Tensor
    values: torch.Tensor


class Float8KV(NamedTuple):
    """Bytes of e4m3 [B,G,S,D] with float32 scales [B,G,U] that S/U tokens share."""

    key_codes: torch.Tensor
    key_scale: torch.Tensor
    value_codes: torch.Tensor
    value_scale: torch.Tensor


Store = FullKV | Float8KV | QuantizedKV


class Decoded(NamedTuple):
    """Output [B,H,D], log-sum-exp [B,H] float32, and the tokens' mass [B,G,S] float32 summed over a group, or None.

    A head that sees no token has output 0, log-sum-exp -inf and mass 0.
    """

    output: torch.Tensor
    lse: torch.Tensor
    mass: torch.Tensor | None


def decode_attention(
    query: torch.Tensor,
    store: Store,
    scale: float,
    lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    with_mass: bool = False,
    backend: str | None = None,
) -> Decoded:
    """Attend query [B,H,D] over a store.

    lengths: tokens [B,G] (int32) that a head sees of the first ones. mask: bool [B,1|G,S], tokens that are seen; both
    must allow a token. What is stored of tokens not seen may be NaN. backend: "torch" or "triton" forces one.
    """
    numbers = store[0]
    if choose("decode_attention", numbers, backend) == "torch":
        return define_decode_attention(query, store, scale, lengths, mask, with_mass)
    B, G, S = numbers.shape[:3]
    if B * G * S == 0:
        return see_nothing(query, G, S, with_mass)
    if lengths is not None:
        lengths = lengths.to(torch.int32).contiguous()
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    if isinstance(store, QuantizedKV):
        found = decode_codes(query, store, scale, lengths, mask, with_mass)
    else:
        found = attend_on_gpu(query, store, scale, lengths, mask, with_mass)
    return Decoded(*found)


def define_decode_attention(
    query: torch.Tensor,
    store: Store,
    scale: float,
    lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    with_mass: bool = False,
) -> Decoded:
    """Do as `decode_attention` does, plainly: the store in float32, and all logits at once."""
    keys, values = to_float32(store)
    (B, H, D), (G, S) = query.shape, keys.shape[1:3]
    if B * G * S == 0:
        return see_nothing(query, G, S, with_mass)
    visible = None
    if lengths is not None:
        visible = torch.arange(S, device=keys.device) < lengths[:, :, None]
    if mask is not None:
        visible = mask if visible is None else mask & visible
    if visible is not None:
        values = values.masked_fill(~visible[..., None], 0.0)
        visible = visible[:, :, None]
    part = partial_attention(query.float().view(B, G, H // G, D), keys, values, visible, scale, with_probs=with_mass)
    mass = None if part.probs is None else part.probs.sum(dim=2)
    return Decoded(part.output.view(B, H, D).to(query.dtype), part.lse.view(B, H), mass)


def to_float32(store: Store) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a store's keys and values [B,G,S,D] as float32."""
    if isinstance(store, FullKV):
        return store.keys.float(), store.values.float()
    if isinstance(store, QuantizedKV):
        return dequantize_kv(store, torch.float32)
    scales = (
        scale.repeat_interleave(store.key_codes.shape[2] // max(1, scale.shape[2]), dim=2)[..., None]
        for scale in (store.key_scale, store.value_scale)
    )
    key_scale, value_scale = scales
    return decode_e4m3(store.key_codes) * key_scale, decode_e4m3(store.value_codes) * value_scale


def see_nothing(query: torch.Tensor, G: int, S: int, with_mass: bool) -> Decoded:
    """Return what a query [B,H,D] gets of no tokens."""
    mass = query.new_zeros(len(query), G, S, dtype=torch.float32) if with_mass else None
    lse = torch.full(query.shape[:2], -torch.inf, device=query.device)
    return Decoded(torch.zeros_like(query), lse, mass)


@jit
def _from_e4m3(codes, PLAIN: tl.constexpr):
    """Return float16 numbers / 256 of e4m3 bytes: the fields of both formats, shifted into place; four at a time."""
    if PLAIN:
        wide = codes.to(tl.int16)
        return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(FROM_E4M3, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


@jit
def _attend_split(
    query, keys, values, key_scale, value_scale, pages, lengths, mask, partial, partial_lse, weights, tile_max,
    num_tokens, num_listed, split_tokens, scale, G, unit_tokens, stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt, stride_mb, stride_mg,
    R: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    PAGE: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, FLOAT8: tl.constexpr,
    WITH_MASS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # One program a key/value head and split. Walked are listed tokens: those of the pages, or all (PAGE 0).
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row, column, offset = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, TILE)
    real, inside = row < R, column < D
    there = real[:, None] & inside[None, :]
    q = tl.load(query + (head * R + row[:, None]) * D + column[None, :], mask=there, other=0.0)
    if FLOAT8:
        q = q.to(tl.float16)
        scale *= 256.0
    else:
        q = q.to(keys.dtype.element_ty)
    keys += head // G * stride_kb + head % G * stride_kg
    values += head // G * stride_vb + head % G * stride_vg
    if HAS_MASK:
        mask += head // G * stride_mb + head % G * stride_mg
    end = num_tokens
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + head), num_tokens)
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, num_listed)
    if PAGE == 0:
        last = tl.minimum(last, end)
    highest = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, TILE):
        listed = start + offset
        seen = listed < last
        token = listed
        if PAGE > 0:
            page = tl.load(pages + head * (num_listed // PAGE) + listed // PAGE, mask=seen, other=0).to(tl.int32)
            token = page * PAGE + listed % PAGE
            seen = seen & (page >= 0) & (token < end)
        if HAS_MASK:
            seen = seen & (tl.load(mask + token, mask=seen, other=0) != 0)
        if COLUMNS == D:
            stored = seen[:, None]
        else:
            stored = seen[:, None] & inside[None, :]
        k = tl.load(keys + token[:, None] * stride_kt + column[None, :], mask=stored, other=0)
        v = tl.load(values + token[:, None] * stride_vt + column[None, :], mask=stored, other=0)
        tile_scale = scale
        if FLOAT8:
            unit = head * (num_tokens // unit_tokens) + start // unit_tokens
            tile_scale *= tl.load(key_scale + unit)
            k, v = _from_e4m3(k, UPCAST), _from_e4m3(v, UPCAST)
        logits = tl.where(seen[None, :], dot(q, tl.trans(k), UPCAST) * tile_scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weight = tl.exp2(logits - higher[:, None])
        fade = tl.exp2(highest - higher)
        highest = higher
        total = total * fade + tl.sum(weight, 1)
        if FLOAT8:
            unit_scale = tl.load(value_scale + unit) * 256.0
            output = output * fade[:, None] + dot(weight.to(tl.float16), v, UPCAST) * unit_scale
        else:
            output = output * fade[:, None] + dot(weight.to(v.dtype), v, UPCAST)
        if WITH_MASS:
            at = (head * R + row) * num_tokens
            spilled = weight.to(weights.dtype.element_ty)
            tl.store(weights + at[:, None] + listed[None, :], spilled, mask=real[:, None] & (listed < last)[None, :])
            tl.store(tile_max + (head * R + row) * tl.cdiv(num_tokens, TILE) + start // TILE, highest, mask=real)
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    at = (head * R + row) * tl.num_programs(1) + split
    tl.store(partial + at[:, None] * D + column[None, :], output, mask=there)
    tl.store(partial_lse + at, tl.where(total > 0, highest + tl.log2(total), float("-inf")), mask=real)


def _launch(rows: int, head_dim: int, exact: bool, by_pages: bool) -> Launch:
    if exact and rows >= 16:
        return EXACT_ROWS
    if exact or head_dim > 128:
        return WIDE
    return PAGES if by_pages else WHOLE


def attend_on_gpu(
    query: torch.Tensor,
    store: FullKV | Float8KV,
    scale: float,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    with_mass: bool,
    pages: torch.Tensor | None = None,
    page_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return output, log-sum-exp and mass by the kernel; of the listed pages [B,G,P] alone, where -1 is none."""
    if isinstance(store, Float8KV):
        keys, values = store.key_codes, store.value_codes
        key_scale, value_scale = store.key_scale.contiguous(), store.value_scale.contiguous()
        unit_tokens = keys.shape[2] // key_scale.shape[2]
    else:
        (keys, values), key_scale, value_scale, unit_tokens = store, None, None, WHOLE.tile
    (B, H, D), (G, S) = query.shape, keys.shape[1:3]
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query.contiguous(), keys, values))
    exact = keys.dtype == torch.float32
    rows = next_power(H // G, 1 if exact else LEAST_ROWS)
    launch = _launch(rows, D, exact, pages is not None)
    tile = launch.tile
    if unit_tokens % tile:
        raise ValueError(f"the kernel reads scales that {tile} tokens share or a multiple of it, got {unit_tokens}")
    listed = S if pages is None else pages.shape[2] * page_tokens
    spill = torch.float32 if exact else torch.float16
    space = plan_splits(query, G, listed, launch, (S, spill) if with_mass else None)
    _attend_split[(B * G, space.num_splits)](
        query, keys, values, key_scale, value_scale, pages, lengths, mask if mask is None else mask.view(torch.uint8),
        *space[1:], S, listed, space.split_tokens, scale * LOG2E, G, unit_tokens,
        *keys.stride()[:3], *values.stride()[:3], *mask_strides(mask),
        R=H // G, ROWS=rows, D=D, COLUMNS=next_power(D, LEAST_CHANNELS), TILE=tile,
        PAGE=page_tokens, HAS_LENGTHS=lengths is not None, HAS_MASK=mask is not None,
        FLOAT8=key_scale is not None, WITH_MASS=with_mass, UPCAST=INTERPRETED,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return merge_splits(space, query.dtype, lengths, tile)
