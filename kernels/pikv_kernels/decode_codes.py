"""Attention of one new token over KIVI's codes of 8, 4 or 2 bits, as the cache stores them: the Triton kernel.

Products run on the codes themselves, centred at zero, since a common offset would drown them in 16-bit operands. Key
scales are folded into the query and value scales into the softmax weights. Two bytes are read at a time: of keys, whose
bytes run along the tokens, they are tokens 2j and 2j + 1 of a unit, at 4 bits each with the one T/2 later; of values
channels 2j, 2j + V/2, 2j + 1 and 2j + 1 + V/2. At 2 bits it is one byte, of four quarters. A tile is a unit, its tokens
in the order in which keys give them. The numbers are made by setting an exponent's bits over the code's, without a
conversion, and above 2 bits two at a time; the interpreter, which knows no assembly, makes them plainly. Tokens are the
rows of the products, so that few query heads waste little.
Shapes: B batch, G key/value heads, R query rows of a head's group, U units of T tokens, K units that are read, D
channels of a key, V of a value, C groups of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from pikv_kernels.backends import INTERPRETED, constexpr, jit, tl
from pikv_kernels.partial_attention import Partial
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

PARTS = ("key_codes", "key_scale", "key_zero", "value_codes", "value_scale", "value_zero")
LEAST_ROWS = 8  # query rows of a program: columns of a product on the matrix units
LEAST_TOKENS = 16  # of a product on the matrix units
FEW_HEADS_4_BITS = Launch(tile=64, num_warps=1, num_stages=3, programs_per_sm=8)
FEW_HEADS_8_BITS = Launch(tile=64, num_warps=2, num_stages=3, programs_per_sm=4)
# More query heads or channels take more registers, which more warps share; each takes all codes apart.
MANY_HEADS = Launch(tile=64, num_warps=2, num_stages=3, programs_per_sm=4)
WIDE_HEADS = Launch(tile=64, num_warps=4, num_stages=3, programs_per_sm=2)
MOST_ROWS = {2: 8, 4: 16, 8: 16}  # whose sums fit registers, by the bits of a code

# Keys as float16: 0x6400 is 1024 and counts ones in its last bits, so a code in the bits above counts sixteens.
KEYS_4_BITS = constexpr("""{
    .reg .b32 later, whole, sixteenth, less, less_sixteenth;
    mov.b32 whole, 0x3C003C00;
    mov.b32 sixteenth, 0x2C002C00;
    mov.b32 less, 0xE408E408;
    mov.b32 less_sixteenth, 0xD480D480;
    shr.b32 later, $4, 8;
    lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $1, $4, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 $2, later, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $3, later, 0x00F000F0, 0x64006400, 0xEA;
    fma.rn.f16x2 $0, $0, whole, less;
    fma.rn.f16x2 $1, $1, sixteenth, less_sixteenth;
    fma.rn.f16x2 $2, $2, whole, less;
    fma.rn.f16x2 $3, $3, sixteenth, less_sixteenth;
}""")
KEYS_8_BITS = constexpr("""{
    .reg .b32 whole, less;
    mov.b32 whole, 0x3C003C00;
    mov.b32 less, 0xE480E480;
    prmt.b32 $0, $2, 0x64646464, 0x4240;
    prmt.b32 $1, $2, 0x64646464, 0x4341;
    fma.rn.f16x2 $0, $0, whole, less;
    fma.rn.f16x2 $1, $1, whole, less;
}""")
# Values as bfloat16, whose range small softmax weights need: 0x4300 is 128 and counts ones in its last seven bits.
VALUES_4_BITS = constexpr("""{
    .reg .b32 second, third, fourth, whole, less;
    mov.b32 whole, 0x3F803F80;
    mov.b32 less, 0xC308C308;
    shr.b32 second, $4, 4;
    shr.b32 third, $4, 8;
    shr.b32 fourth, $4, 12;
    lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $1, second, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $2, third, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $3, fourth, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, $0, whole, less;
    fma.rn.bf16x2 $1, $1, whole, less;
    fma.rn.bf16x2 $2, $2, whole, less;
    fma.rn.bf16x2 $3, $3, whole, less;
}""")
# A byte's eighth bit makes the -256 (0xC380) that is added to its other seven bits a -128 (0xC300).
VALUES_8_BITS = constexpr("""{
    .reg .b32 low, high, whole, less0, less1, less2, less3;
    mov.b32 whole, 0x3F803F80;
    shr.b32 low, $4, 8;
    shr.b32 high, $5, 8;
    lop3.b32 less0, $4, 0x00800080, 0xC380C380, 0x6A;
    lop3.b32 less1, $5, 0x00800080, 0xC380C380, 0x6A;
    lop3.b32 less2, low, 0x00800080, 0xC380C380, 0x6A;
    lop3.b32 less3, high, 0x00800080, 0xC380C380, 0x6A;
    lop3.b32 $0, $4, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 $1, $5, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 $2, low, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 $3, high, 0x007F007F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, $0, whole, less0;
    fma.rn.bf16x2 $1, $1, whole, less1;
    fma.rn.bf16x2 $2, $2, whole, less2;
    fma.rn.bf16x2 $3, $3, whole, less3;
}""")


OVER_256, OVER_32 = constexpr(0x5C00), constexpr(0x4200)  # float16 and bfloat16, whose third last bit is a 1


@jit
def _plain_codes(low, high, BITS: tl.constexpr):
    """Return the four quarters, centred, as float32."""
    MOST: tl.constexpr = 2**BITS - 1
    CENTRE: tl.constexpr = 2 ** (BITS - 1)
    return (
        ((low & MOST) - CENTRE).to(tl.float32),
        ((high & MOST) - CENTRE).to(tl.float32),
        (((low >> 8) & MOST) - CENTRE).to(tl.float32),
        (((high >> 8) & MOST) - CENTRE).to(tl.float32),
    )


@jit
def _crumb(bytes_, place: tl.constexpr, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """Return the codes of 2 bits at a place in bytes, less 1.5, their mean: set behind 256, or 32 in bfloat16."""
    fours = ((bytes_ << 2) if place == 0 else (bytes_ >> 2 * place - 2)) & 12
    if PLAIN:
        return fours.to(tl.float32) * 0.25 - 1.5
    else:
        OVER: tl.constexpr = OVER_256 if DTYPE == tl.float16 else OVER_32
        LESS: tl.constexpr = 257.5 if DTYPE == tl.float16 else 33.5
        return (fours.to(tl.int16) | OVER).to(DTYPE, bitcast=True) - tl.full([], LESS, DTYPE)


@jit
def _multiply_keys(pairs, q, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """Return the products [TILE,ROWS] of the centred codes of bytes or pairs of them [J,D] with query rows [D,ROWS].

    At 2 bits row 4j + 2p + q of bytes is token j + (2p + q)·T/4 of the unit, at 4 bits, of pairs, 2j + p·T/2 + q, and
    at 8 bits row j is token j.
    """
    if BITS == 2:
        k0, k1 = _crumb(pairs, 0, tl.float16, PLAIN), _crumb(pairs, 1, tl.float16, PLAIN)
        k2, k3 = _crumb(pairs, 2, tl.float16, PLAIN), _crumb(pairs, 3, tl.float16, PLAIN)
        even = tl.join(dot(k0, q, PLAIN), dot(k2, q, PLAIN))
        odd = tl.join(dot(k1, q, PLAIN), dot(k3, q, PLAIN))
        products = tl.permute(tl.join(even, odd), (0, 2, 3, 1))
    elif BITS == 4:
        if PLAIN:
            k0, k1, k2, k3 = _plain_codes(pairs, pairs >> 4, BITS)
        else:
            k0, k1, k2, k3 = tl.inline_asm_elementwise(
                KEYS_4_BITS, "=&r,=&r,=&r,=&r,r", [pairs],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        even = tl.join(dot(k0, q, PLAIN), dot(k1, q, PLAIN))
        odd = tl.join(dot(k2, q, PLAIN), dot(k3, q, PLAIN))
        products = tl.permute(tl.join(even, odd), (0, 2, 3, 1))
    else:
        if PLAIN:
            k0, _, k1, _ = _plain_codes(pairs, pairs, BITS)
        else:
            k0, k1 = tl.inline_asm_elementwise(
                KEYS_8_BITS, "=&r,=&r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
            )
        products = tl.permute(tl.join(dot(k0, q, PLAIN), dot(k1, q, PLAIN)), (0, 2, 1))
    return tl.reshape(products, (pairs.shape[0] * (4 if BITS == 2 else 16 // BITS), q.shape[1]))


@jit
def _value_codes(low, high, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """Return four quarters of channels, centred, of bytes (2 bits) or pairs; `high`: the upper half's, at 8 bits.

    The second and the fourth are of the upper half.
    """
    if BITS == 2:
        return (
            _crumb(low, 0, tl.bfloat16, PLAIN),
            _crumb(low, 2, tl.bfloat16, PLAIN),
            _crumb(low, 1, tl.bfloat16, PLAIN),
            _crumb(low, 3, tl.bfloat16, PLAIN),
        )
    elif PLAIN:
        return _plain_codes(low, low >> 4 if BITS == 4 else high, BITS)
    elif BITS == 4:
        return tl.inline_asm_elementwise(
            VALUES_4_BITS, "=&r,=&r,=&r,=&r,r", [low],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            VALUES_8_BITS, "=&r,=&r,=&r,=&r,r,r", [low, high],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip


@jit
def _scaled(codes, scale, zero, at, channel, seen, V: tl.constexpr, C: tl.constexpr, CENTRE: tl.constexpr):
    """Return the numbers [COLUMNS,TILE] that centred codes of some channels stand for, in bfloat16."""
    group = tl.minimum(channel // (V // C), C - 1)
    s = tl.load(scale + at[None, :] + group[:, None], mask=seen[None, :], other=0.0).to(tl.float32)
    z = tl.load(zero + at[None, :] + group[:, None], mask=seen[None, :], other=0.0).to(tl.float32)
    return (codes.to(tl.float32) * s + (z + CENTRE * s)).to(tl.bfloat16)


# What grows with a sequence: Triton would compile anew where it becomes a multiple of 16, or 1.
@jit(do_not_specialize=["num_units", "num_read", "split_units", "room", "stride_mb", "stride_mg"])
def _attend_split(
    query, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, units, mask,
    partial, partial_lse, probs, num_units, num_read, split_units, room, scale, softcap, G, stride_mb, stride_mg,
    R: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, V: tl.constexpr,
    COLUMNS: tl.constexpr, C: tl.constexpr, T: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr,
    BITS: tl.constexpr, HAS_UNITS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    WITH_PROBS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # One program a key/value head and split; a head's units begin `room` units after those of the one before.
    # What is read at a time, bytes at 2 bits and else pairs of them, holds EACH codes.
    EACH: tl.constexpr = 4 if BITS == 2 else 16 // BITS
    ROW_PAIRS: tl.constexpr = V // EACH
    UNIT_PAIRS: tl.constexpr = T // EACH
    QUARTER: tl.constexpr = V // 4
    HALF: tl.constexpr = V // 2
    STEP: tl.constexpr = 1 if BITS == 2 else 2
    NEXT: tl.constexpr = QUARTER if BITS == 2 else 1
    CENTRE: tl.constexpr = 1.5 if BITS == 2 else 2.0 ** (BITS - 1)
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row, channel, column = tl.arange(0, ROWS), tl.arange(0, CHANNELS), tl.arange(0, COLUMNS)
    pair, place = tl.arange(0, PAIRS), tl.arange(0, TILE)
    real, inside = row < R, column < QUARTER
    if BITS == 2:
        token = place // 4 + place % 4 * (T // 4)
        whole = place < 4 * UNIT_PAIRS
    elif BITS == 4:
        token = place // 4 * 2 + place // 2 % 2 * (T // 2) + place % 2
        whole = place < 4 * UNIT_PAIRS
    else:
        token, whole = place, place < T
    q = tl.load(
        query + (head * R + row[None, :]) * D + channel[:, None],
        mask=real[None, :] & (channel < D)[:, None], other=0.0,
    ).to(tl.float32) * scale  # fmt: skip
    if HAS_MASK:
        mask += head // G * stride_mb + head % G * stride_mg
    first = split * split_units
    last = tl.minimum(first + split_units, num_read)
    highest = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    low_zero = tl.zeros([ROWS], tl.float32)
    high_zero = tl.zeros([ROWS], tl.float32)
    o0 = tl.zeros([COLUMNS, ROWS], tl.float32)
    o1 = tl.zeros([COLUMNS, ROWS], tl.float32)
    o2 = tl.zeros([COLUMNS, ROWS], tl.float32)
    o3 = tl.zeros([COLUMNS, ROWS], tl.float32)
    for listed in range(first, last):
        unit = listed
        seen = whole
        if HAS_UNITS:
            unit = tl.load(units + head * num_read + listed).to(tl.int32)
            seen = seen & (unit * T + token < num_units * T)
            unit = tl.minimum(unit, num_units - 1)
        at = head * room + unit
        if HAS_MASK:
            seen = seen & (tl.load(mask + unit * T + token, mask=seen, other=0) != 0)
        pairs = (at * D + channel[None, :]) * UNIT_PAIRS + pair[:, None]
        if CHANNELS == D and PAIRS == UNIT_PAIRS:
            k = tl.load(key_codes + pairs)
        else:
            k = tl.load(key_codes + pairs, mask=(channel < D)[None, :] & (pair < UNIT_PAIRS)[:, None], other=0)
        s = tl.load(key_scale + at * D + channel, mask=channel < D, other=0.0).to(tl.float32)
        z = tl.load(key_zero + at * D + channel, mask=channel < D, other=0.0).to(tl.float32) + CENTRE * s
        logits = _multiply_keys(k, (q * s[:, None]).to(tl.float16), BITS, UPCAST)
        logits += tl.sum(q * z[:, None], 0)[None, :]
        if HAS_CAP:
            logits = cap(logits, softcap)
        if HAS_MASK or HAS_UNITS or PAIRS != UNIT_PAIRS:
            logits = tl.where(seen[:, None], logits, float("-inf"))
        if WITH_PROBS:
            rows = (head * R + row) * (num_units * T)
            tl.store(probs + rows[None, :] + (unit * T + token)[:, None], logits, mask=real[None, :] & whole[:, None])
        higher = tl.maximum(highest, tl.max(logits, 0))
        weight = tl.exp2(logits - higher[None, :])
        fade = tl.exp2(highest - higher)
        highest = higher
        total = total * fade + tl.sum(weight, 0)

        rows = (at * T + token[None, :]) * ROW_PAIRS + column[:, None]
        # A unit's tokens are all stored; what lies beyond the channels is never used.
        stored = inside[:, None] if PAIRS == UNIT_PAIRS else inside[:, None] & whole[None, :]
        v_low = tl.load(value_codes + rows, mask=stored, other=0)
        v_high = v_low
        if BITS == 8:
            v_high = tl.load(value_codes + rows + QUARTER, mask=stored, other=0)
        v0, v1, v2, v3 = _value_codes(v_low, v_high, BITS, UPCAST)
        rows = (at * T + token) * C
        if C <= 2:
            w0 = tl.load(value_scale + rows, mask=seen, other=0.0).to(tl.float32)
            y0 = tl.load(value_zero + rows, mask=seen, other=0.0).to(tl.float32) + CENTRE * w0
            low_weight = (weight * w0[:, None]).to(tl.bfloat16)
            low_zero = low_zero * fade + tl.sum(weight * y0[:, None], 0)
            high_weight = low_weight
            if C == 2:
                w1 = tl.load(value_scale + rows + 1, mask=seen, other=0.0).to(tl.float32)
                y1 = tl.load(value_zero + rows + 1, mask=seen, other=0.0).to(tl.float32) + CENTRE * w1
                high_weight = (weight * w1[:, None]).to(tl.bfloat16)
                high_zero = high_zero * fade + tl.sum(weight * y1[:, None], 0)
        else:
            low_weight = weight.to(tl.bfloat16)
            high_weight = low_weight
            v0 = _scaled(v0, value_scale, value_zero, rows, STEP * column, seen, V, C, CENTRE)
            v1 = _scaled(v1, value_scale, value_zero, rows, STEP * column + HALF, seen, V, C, CENTRE)
            v2 = _scaled(v2, value_scale, value_zero, rows, STEP * column + NEXT, seen, V, C, CENTRE)
            v3 = _scaled(v3, value_scale, value_zero, rows, STEP * column + NEXT + HALF, seen, V, C, CENTRE)
        o0 = o0 * fade[None, :] + dot(v0, low_weight, UPCAST)
        o1 = o1 * fade[None, :] + dot(v1, high_weight, UPCAST)
        o2 = o2 * fade[None, :] + dot(v2, low_weight, UPCAST)
        o3 = o3 * fade[None, :] + dot(v3, high_weight, UPCAST)
    if C == 1:
        high_zero = low_zero
    whole_share = 1.0 / tl.where(total > 0, total, 1.0)[None, :]
    at = (head * R + row) * tl.num_programs(1) + split
    outputs = partial + at[None, :] * V + STEP * column[:, None]
    there = real[None, :] & inside[:, None]
    tl.store(outputs, (o0 + low_zero[None, :]) * whole_share, mask=there)
    tl.store(outputs + HALF, (o1 + high_zero[None, :]) * whole_share, mask=there)
    tl.store(outputs + NEXT, (o2 + low_zero[None, :]) * whole_share, mask=there)
    tl.store(outputs + NEXT + HALF, (o3 + high_zero[None, :]) * whole_share, mask=there)
    tl.store(partial_lse + at, tl.where(total > 0, highest + tl.log2(total), float("-inf")), mask=real)


def what_hinders(query: torch.Tensor, codes: Mapping[str, torch.Tensor], bits: int) -> str | None:
    """Return why the kernel cannot attend query [B,G,R,D] over these codes, None where it can."""
    T, D = codes["value_codes"].shape[3], query.shape[3]
    V = codes["value_codes"].shape[4] * 8 // bits
    if bits not in (2, 4, 8):
        return f"no kernel for codes of {bits} bits"
    if T not in (16, 32, 64, 128):
        return f"no kernel for units of {T} tokens"
    if V % 4 or max(D, V) > 256:
        return "no kernel for these head dims"
    most_rows = MOST_ROWS[bits]
    if query.shape[2] > most_rows:
        return f"no kernel for more than {most_rows} query rows"
    return None


def decode_codes(
    query: torch.Tensor,
    codes: Mapping[str, torch.Tensor],
    bits: int,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    with_probs: bool = False,
    units: torch.Tensor | None = None,
) -> Partial:
    """Attend query [B,G,R,D] over codes by the kernel; the arguments are those of `attend_codes`."""
    B, G, R, D = query.shape
    U, T, C = codes["value_scale"].shape[2:]
    V = codes["value_codes"].shape[4] * 8 // bits
    each, element = (4, torch.uint8) if bits == 2 else (16 // bits, torch.int16)
    if units is not None:
        units = units.contiguous()
    num_read = U if units is None else units.shape[2]
    if num_read * U * B * G == 0:
        return see_nothing(query, V, U * T, with_probs)
    parts, room = _in_place([codes[name] for name in PARTS])
    rows = next_power(R, LEAST_ROWS)
    few_heads = FEW_HEADS_4_BITS if bits == 4 else FEW_HEADS_8_BITS
    launch = (WIDE_HEADS if max(D, V) > 128 else MANY_HEADS if rows > LEAST_ROWS else few_heads)._replace(tile=T)
    space = plan_splits(query, V, num_read * T, launch, U * T if with_probs else None)
    pairs = max(LEAST_TOKENS, T // each)
    if visible is not None and visible.stride(-1) != 1:
        visible = visible.contiguous()
    _attend_split[(B * G, space.num_splits)](
        query.contiguous(), *(x.view(element) if x.dtype == torch.uint8 else x for x in parts), units,
        visible if visible is None else visible.view(torch.uint8), *space[1:],
        U, num_read, space.split_tokens // T, room, scale * LOG2E, (softcap or 0.0) * LOG2E, G, *mask_strides(visible),
        R=R, ROWS=rows, D=D, CHANNELS=next_power(D, LEAST_CHANNELS), V=V,
        COLUMNS=next_power(V // 4, LEAST_CHANNELS), C=C, T=T, PAIRS=pairs, TILE=pairs * each, BITS=bits,
        HAS_UNITS=units is not None, HAS_MASK=visible is not None, HAS_CAP=softcap is not None, WITH_PROBS=with_probs,
        UPCAST=INTERPRETED, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return merge_splits(space, query.dtype, None)


def _in_place(parts: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """Return parts [B,G,U,...] whose heads begin equally many units apart, and how many; copies where they do not."""
    rooms = {_room(x) for x in parts}
    room = rooms.pop()
    if rooms or not room:
        return [x.contiguous() for x in parts], parts[0].shape[2]
    return parts, room


def _room(x: torch.Tensor) -> int:
    """Return how many units after those of a head [B,G,U,...] the next one's begin, 0 where that is no number."""
    B, G, U = x.shape[:3]
    inner = math.prod(x.shape[3:])
    head = x.stride(1) if G > 1 else x.stride(0) if B > 1 else U * inner
    is_even = x[0, 0].is_contiguous() and head % inner == 0 and (1 in (B, G) or x.stride(0) == G * head)
    return head // inner if is_even else 0
