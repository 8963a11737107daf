"""Attention of one new token over a store of keys and values: in full precision, or in 8-bit floats.

The kernel splits the tokens over programs and merges by log-sum-exp (flash-decoding); `decode_codes` reads codes.
Shapes: B batch, G key/value heads, R query rows of a head's group, H = G·R, S stored tokens, D channels of a key, V of
a value, P pages, U units of tokens that share a scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pikv_kernels.backends import INTERPRETED, choose, constexpr, jit, tl
from pikv_kernels.float8 import decode_e4m3
from pikv_kernels.partial_attention import Partial, partial_attention
from pikv_kernels.split_tokens import (
    LEAST_CHANNELS,
    LOG2E,
    Launch,
    cap,
    dot,
    mask_strides,
    merge_splits,
    next_power,
    plan_splits,
    see_nothing,
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
FLOAT8 = Launch(tile=64, num_warps=2, num_stages=3, programs_per_sm=4)
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


Store = FullKV | Float8KV


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
    if choose("decode_attention", store[0], backend) == "torch":
        return define_decode_attention(query, store, scale, lengths, mask, with_mass)
    visible = None if mask is None else mask[:, :, None]
    rows = query.unflatten(1, (store[0].shape[1], -1))
    return as_decoded(attend_on_gpu(rows, store, visible, scale, None, with_mass, lengths))


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
    rows = query.float().unflatten(1, (keys.shape[1], -1))
    S = keys.shape[2]
    if S == 0:
        return as_decoded(see_nothing(rows.to(query.dtype), values.shape[3], S, with_mass))
    visible = None
    if lengths is not None:
        visible = torch.arange(S, device=keys.device) < lengths[:, :, None]
    if mask is not None:
        visible = mask if visible is None else mask & visible
    if visible is not None:
        values = values.masked_fill(~visible[..., None], 0.0)
        visible = visible[:, :, None]
    part = partial_attention(rows, keys, values, visible, scale, with_probs=with_mass)
    return as_decoded(part._replace(output=part.output.to(query.dtype)))


def to_float32(store: Store) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a store's keys and values [B,G,S,D] as float32."""
    if isinstance(store, FullKV):
        return store.keys.float(), store.values.float()
    scales = (
        scale.repeat_interleave(store.key_codes.shape[2] // max(1, scale.shape[2]), dim=2)[..., None]
        for scale in (store.key_scale, store.value_scale)
    )
    key_scale, value_scale = scales
    return decode_e4m3(store.key_codes) * key_scale, decode_e4m3(store.value_codes) * value_scale


def as_decoded(part: Partial) -> Decoded:
    """Return a part's heads side by side, and the mass of a group."""
    mass = None if part.probs is None else part.probs.sum(dim=2)
    return Decoded(part.output.flatten(1, 2), part.lse.flatten(1), mass)


@jit
def _from_e4m3(codes, PLAIN: tl.constexpr):
    """Return float16 numbers / 256 of e4m3 bytes: the fields of both formats, shifted into place; four at a time."""
    if PLAIN:
        wide = codes.to(tl.int16)
        return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(FROM_E4M3, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


@jit(do_not_specialize=["num_tokens", "num_listed", "stride_mb", "stride_mg"])  # what grows, as in `decode_codes`
def _attend_split(
    query, keys, values, key_scale, value_scale, pages, lengths, mask, partial, partial_lse, probs,
    num_tokens, num_listed, split_tokens, scale, softcap, G, stride_kb, stride_kg, stride_kt,
    stride_vb, stride_vg, stride_vt, stride_mb, stride_mg,
    R: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, V: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr, UNIT: tl.constexpr, WITH_PROBS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # One program a key/value head and split. Walked are listed tokens: those of the pages, or all (PAGE 0).
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row, column, offset = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, TILE)
    value_column = tl.arange(0, VALUE_COLUMNS)
    real, inside, value_inside = row < R, column < D, value_column < V
    there = real[:, None] & inside[None, :]
    q = tl.load(query + (head * R + row[:, None]) * D + column[None, :], mask=there, other=0.0)
    if UNIT:  # e4m3, whose scales that many tokens share
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
    output = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
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
        stored = seen[:, None] if COLUMNS == D else seen[:, None] & inside[None, :]
        k = tl.load(keys + token[:, None] * stride_kt + column[None, :], mask=stored, other=0)
        stored = seen[:, None] if VALUE_COLUMNS == V else seen[:, None] & value_inside[None, :]
        v = tl.load(values + token[:, None] * stride_vt + value_column[None, :], mask=stored, other=0)
        if UNIT:
            unit = head * (num_tokens // UNIT) + token // UNIT
            k, v = _from_e4m3(k, UPCAST), _from_e4m3(v, UPCAST)
            own_scale = tl.load(key_scale + unit, mask=seen, other=0.0) * scale
            logits = dot(q, tl.trans(k), UPCAST) * own_scale[None, :]
        else:
            logits = dot(q, tl.trans(k), UPCAST) * scale
        if HAS_CAP:
            logits = cap(logits, softcap)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        if WITH_PROBS:
            at = (head * R + row) * num_tokens
            tl.store(probs + at[:, None] + token[None, :], logits, mask=real[:, None] & (listed < last)[None, :])
        higher = tl.maximum(highest, tl.max(logits, 1))
        weight = tl.exp2(logits - higher[:, None])
        fade = tl.exp2(highest - higher)
        highest = higher
        total = total * fade + tl.sum(weight, 1)
        if UNIT:
            weight *= tl.load(value_scale + unit, mask=seen, other=0.0)[None, :] * 256.0
        output = output * fade[:, None] + dot(weight.to(v.dtype), v, UPCAST)
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    at = (head * R + row) * tl.num_programs(1) + split
    outputs = partial + at[:, None] * V + value_column[None, :]
    tl.store(outputs, output, mask=real[:, None] & value_inside[None, :])
    tl.store(partial_lse + at, tl.where(total > 0, highest + tl.log2(total), float("-inf")), mask=real)


def _launch(rows: int, head_dim: int, dtype: torch.dtype, by_pages: bool) -> Launch:
    exact = dtype == torch.float32
    if exact and rows >= 16:
        return EXACT_ROWS
    if exact or head_dim > 128:
        return WIDE
    return PAGES if by_pages else FLOAT8 if dtype == torch.uint8 else WHOLE


def what_hinders(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> str | None:
    """Return why the kernel cannot attend query [B,G,R,D] over keys [B,G,S,D], values [B,G,S,V]; None where it can."""
    if max(query.shape[3], values.shape[3]) > 256:
        return "no kernel for these head dims"
    return None


def attend_on_gpu(
    query: torch.Tensor,
    store: Store,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    with_probs: bool = False,
    lengths: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    page_tokens: int = 0,
) -> Partial:
    """Attend query [B,G,R,D] by the kernel, in the keys' precision; `visible` bool [B,1|G,1,S], None for all.

    lengths: tokens [B,G] that a head sees of the first ones. pages: [B,G,P] that are read alone, without probs, in any
    order, each once; -1 is none. What is stored of tokens not seen may be NaN.
    """
    assert pages is None or not with_probs
    if isinstance(store, Float8KV):
        keys, values = store.key_codes, store.value_codes
        key_scale, value_scale = store.key_scale.contiguous(), store.value_scale.contiguous()
        unit_tokens = keys.shape[2] // max(1, key_scale.shape[2])
    else:
        (keys, values), key_scale, value_scale, unit_tokens = store, None, None, 0
    (B, G, R, D), (S, V) = query.shape, values.shape[2:]
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query.contiguous(), keys, values))
    exact = keys.dtype == torch.float32
    rows = next_power(R, 1 if exact else LEAST_ROWS)
    launch = _launch(rows, max(D, V), keys.dtype, pages is not None)
    tile = launch.tile
    listed = S if pages is None else pages.shape[2] * page_tokens
    if listed * S * B * G == 0:
        return see_nothing(query, V, S, with_probs)
    if pages is not None:
        pages = pages.contiguous()
    if lengths is not None:
        lengths = lengths.to(torch.int32).contiguous()
    if visible is not None and visible.stride(-1) != 1:
        visible = visible.contiguous()
    space = plan_splits(query, V, listed, launch, S if with_probs else None)
    _attend_split[(B * G, space.num_splits)](
        query, keys, values, key_scale, value_scale, pages, lengths,
        visible if visible is None else visible.view(torch.uint8), *space[1:],
        S, listed, space.split_tokens, scale * LOG2E, (softcap or 0.0) * LOG2E, G,
        *keys.stride()[:3], *values.stride()[:3], *mask_strides(visible),
        R=R, ROWS=rows, D=D, COLUMNS=next_power(D, LEAST_CHANNELS), V=V,
        VALUE_COLUMNS=next_power(V, LEAST_CHANNELS), TILE=tile, PAGE=page_tokens, HAS_LENGTHS=lengths is not None,
        HAS_MASK=visible is not None, HAS_CAP=softcap is not None, UNIT=unit_tokens, WITH_PROBS=with_probs,
        UPCAST=INTERPRETED, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return merge_splits(space, query.dtype, lengths)
