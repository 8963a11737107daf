"""Attention of one new token over codes of 8 or 4 bits, as `quantize_kv` makes them: the Triton kernel.

Products run on the codes themselves, centred at zero, since a common offset would drown them in 16-bit operands. Key
scales are folded into the query and value scales into the softmax weights. Two bytes are read at a time, which gives
four quarters of the channels: 2j, 2j + D/2, 2j + 1 and 2j + 1 + D/2. The numbers are made two at a time by setting an
exponent's bits over the code's, without a conversion; the interpreter, which knows no assembly, makes them plainly.
Tokens are the rows of the products, so that few query heads waste little. Shapes as in `decode_attention`.
"""

from __future__ import annotations

import torch

from pikv_kernels.backends import INTERPRETED, constexpr, jit, tl
from pikv_kernels.quantize_kv import GROUP_TOKENS, QuantizedKV
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

LEAST_ROWS = 8  # query heads of a program: columns of a product on the matrix units
FEW_HEADS_4_BITS = Launch(tile=GROUP_TOKENS, num_warps=2, num_stages=3, programs_per_sm=6)
FEW_HEADS_8_BITS = FEW_HEADS_4_BITS._replace(programs_per_sm=4)  # for their registers
# More query heads or channels take more registers, which more warps share.
MANY_HEADS = Launch(tile=GROUP_TOKENS, num_warps=4, num_stages=3, programs_per_sm=3)
MOST_HEADS = Launch(tile=GROUP_TOKENS, num_warps=8, num_stages=3, programs_per_sm=1)

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
    prmt.b32 $0, $4, 0x64646464, 0x4240;
    prmt.b32 $1, $5, 0x64646464, 0x4240;
    prmt.b32 $2, $4, 0x64646464, 0x4341;
    prmt.b32 $3, $5, 0x64646464, 0x4341;
    fma.rn.f16x2 $0, $0, whole, less;
    fma.rn.f16x2 $1, $1, whole, less;
    fma.rn.f16x2 $2, $2, whole, less;
    fma.rn.f16x2 $3, $3, whole, less;
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


@jit
def _plain_codes(low, high, BITS: tl.constexpr):
    """Return the four quarters, centred, as float32."""
    MOST: tl.constexpr = 2**BITS - 1
    CENTRE: tl.constexpr = 2 ** (BITS - 1)
    if BITS == 4:
        high = low >> 4
    return (
        ((low & MOST) - CENTRE).to(tl.float32),
        ((high & MOST) - CENTRE).to(tl.float32),
        (((low >> 8) & MOST) - CENTRE).to(tl.float32),
        (((high >> 8) & MOST) - CENTRE).to(tl.float32),
    )


@jit
def _key_codes(low, high, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """Return the four quarters, centred, of pairs of bytes; at 8 bits `high` holds the upper half's channels."""
    if PLAIN:
        return _plain_codes(low, high, BITS)
    elif BITS == 4:
        return tl.inline_asm_elementwise(
            KEYS_4_BITS, "=&r,=&r,=&r,=&r,r", [low],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            KEYS_8_BITS, "=&r,=&r,=&r,=&r,r,r", [low, high],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip


@jit
def _value_codes(low, high, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """Return what `_key_codes` does, of values."""
    if PLAIN:
        return _plain_codes(low, high, BITS)
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
def _attend_split(
    query, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths, mask,
    partial, partial_lse, weights, tile_max, num_tokens, split_tokens, scale, G, stride_mb, stride_mg,
    R: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    BITS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, WITH_MASS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # One program a key/value head and split. A tile is a group of the keys; codes are read as pairs of bytes.
    PAIRS: tl.constexpr = D * BITS // 16
    QUARTER: tl.constexpr = D // 4
    HALF: tl.constexpr = D // 2
    CENTRE: tl.constexpr = 2.0 ** (BITS - 1)
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row, column, offset = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, TILE)
    real, inside = row < R, column < QUARTER
    there = real[None, :] & inside[:, None]
    rows = query + (head * R + row[None, :]) * D + 2 * column[:, None]
    q0 = tl.load(rows, mask=there, other=0.0).to(tl.float32) * scale
    q1 = tl.load(rows + HALF, mask=there, other=0.0).to(tl.float32) * scale
    q2 = tl.load(rows + 1, mask=there, other=0.0).to(tl.float32) * scale
    q3 = tl.load(rows + 1 + HALF, mask=there, other=0.0).to(tl.float32) * scale
    if HAS_MASK:
        mask += head // G * stride_mb + head % G * stride_mg
    end = num_tokens
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + head), num_tokens)
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, end)
    highest = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    low_zero = tl.zeros([ROWS], tl.float32)
    high_zero = tl.zeros([ROWS], tl.float32)
    o0 = tl.zeros([COLUMNS, ROWS], tl.float32)
    o1 = tl.zeros([COLUMNS, ROWS], tl.float32)
    o2 = tl.zeros([COLUMNS, ROWS], tl.float32)
    o3 = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(first, last, TILE):
        token = start + offset
        pairs = (head * num_tokens + token[:, None]) * PAIRS + column[None, :]
        # The tile's tokens are all stored; what lies beyond the channels is never used.
        k_low = tl.load(key_codes + pairs, mask=inside[None, :], other=0)
        k_high = k_low
        v_low = tl.load(value_codes + pairs, mask=inside[None, :], other=0)
        v_high = v_low
        if BITS == 8:
            k_high = tl.load(key_codes + pairs + QUARTER, mask=inside[None, :], other=0)
            v_high = tl.load(value_codes + pairs + QUARTER, mask=inside[None, :], other=0)
        at = (head * num_tokens + start) // TILE * D + 2 * column
        s0 = tl.load(key_scale + at, mask=inside, other=0.0).to(tl.float32)
        s1 = tl.load(key_scale + at + HALF, mask=inside, other=0.0).to(tl.float32)
        s2 = tl.load(key_scale + at + 1, mask=inside, other=0.0).to(tl.float32)
        s3 = tl.load(key_scale + at + 1 + HALF, mask=inside, other=0.0).to(tl.float32)
        z0 = tl.load(key_zero + at, mask=inside, other=0.0).to(tl.float32) + CENTRE * s0
        z1 = tl.load(key_zero + at + HALF, mask=inside, other=0.0).to(tl.float32) + CENTRE * s1
        z2 = tl.load(key_zero + at + 1, mask=inside, other=0.0).to(tl.float32) + CENTRE * s2
        z3 = tl.load(key_zero + at + 1 + HALF, mask=inside, other=0.0).to(tl.float32) + CENTRE * s3
        k0, k1, k2, k3 = _key_codes(k_low, k_high, BITS, UPCAST)
        logits = dot(k0, (q0 * s0[:, None]).to(tl.float16), UPCAST)
        logits += dot(k1, (q1 * s1[:, None]).to(tl.float16), UPCAST)
        logits += dot(k2, (q2 * s2[:, None]).to(tl.float16), UPCAST)
        logits += dot(k3, (q3 * s3[:, None]).to(tl.float16), UPCAST)
        shift = tl.sum(q0 * z0[:, None] + q1 * z1[:, None] + q2 * z2[:, None] + q3 * z3[:, None], 0)
        logits += shift[None, :]
        seen = token < last
        if HAS_MASK:
            seen = seen & (tl.load(mask + token, mask=seen, other=0) != 0)
        if HAS_LENGTHS or HAS_MASK:
            logits = tl.where(seen[:, None], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 0))
        weight = tl.exp2(logits - higher[None, :])
        fade = tl.exp2(highest - higher)
        highest = higher
        total = total * fade + tl.sum(weight, 0)

        at = (head * num_tokens + token) * 2
        w0 = tl.load(value_scale + at, mask=seen, other=0.0).to(tl.float32)
        w1 = tl.load(value_scale + at + 1, mask=seen, other=0.0).to(tl.float32)
        y0 = tl.load(value_zero + at, mask=seen, other=0.0).to(tl.float32) + CENTRE * w0
        y1 = tl.load(value_zero + at + 1, mask=seen, other=0.0).to(tl.float32) + CENTRE * w1
        v0, v1, v2, v3 = _value_codes(v_low, v_high, BITS, UPCAST)
        low_weight = (weight * w0[:, None]).to(tl.bfloat16)
        high_weight = (weight * w1[:, None]).to(tl.bfloat16)
        o0 = o0 * fade[None, :] + dot(tl.trans(v0), low_weight, UPCAST)
        o1 = o1 * fade[None, :] + dot(tl.trans(v1), high_weight, UPCAST)
        o2 = o2 * fade[None, :] + dot(tl.trans(v2), low_weight, UPCAST)
        o3 = o3 * fade[None, :] + dot(tl.trans(v3), high_weight, UPCAST)
        low_zero = low_zero * fade + tl.sum(weight * y0[:, None], 0)
        high_zero = high_zero * fade + tl.sum(weight * y1[:, None], 0)
        if WITH_MASS:
            at = (head * R + row) * num_tokens
            spilled = weight.to(weights.dtype.element_ty)
            tl.store(weights + at[None, :] + token[:, None], spilled, mask=real[None, :] & (token < last)[:, None])
            tl.store(tile_max + (head * R + row) * (num_tokens // TILE) + start // TILE, highest, mask=real)
    whole = 1.0 / tl.where(total > 0, total, 1.0)[None, :]
    at = (head * R + row) * tl.num_programs(1) + split
    outputs = partial + at[None, :] * D + 2 * column[:, None]
    tl.store(outputs, (o0 + low_zero[None, :]) * whole, mask=there)
    tl.store(outputs + HALF, (o1 + high_zero[None, :]) * whole, mask=there)
    tl.store(outputs + 1, (o2 + low_zero[None, :]) * whole, mask=there)
    tl.store(outputs + 1 + HALF, (o3 + high_zero[None, :]) * whole, mask=there)
    tl.store(partial_lse + at, tl.where(total > 0, highest + tl.log2(total), float("-inf")), mask=real)


def decode_codes(
    query: torch.Tensor,
    store: QuantizedKV,
    scale: float,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    with_mass: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return output [B,H,D], log-sum-exp [B,H] and mass [B,G,S] or None by the kernel."""
    B, H, D = query.shape
    G, S = store.key_codes.shape[1:3]
    query, store = query.contiguous(), QuantizedKV(*(part.contiguous() for part in store))
    rows = next_power(H // G, LEAST_ROWS)
    few_heads = FEW_HEADS_4_BITS if store.bits == 4 else FEW_HEADS_8_BITS
    launch = (few_heads, MANY_HEADS, MOST_HEADS)[(rows > LEAST_ROWS) + (D > 128)]
    space = plan_splits(query, G, S, launch, (S, torch.float16) if with_mass else None)
    _attend_split[(B * G, space.num_splits)](
        query, store.key_codes.view(torch.int16), store.key_scale, store.key_zero,
        store.value_codes.view(torch.int16), store.value_scale, store.value_zero, lengths,
        mask if mask is None else mask.view(torch.uint8), *space[1:],
        S, space.split_tokens, scale * LOG2E, G, *mask_strides(mask),
        R=H // G, ROWS=rows, D=D, COLUMNS=next_power(D // 4, LEAST_CHANNELS),
        TILE=GROUP_TOKENS, BITS=store.bits, HAS_LENGTHS=lengths is not None, HAS_MASK=mask is not None,
        WITH_MASS=with_mass, UPCAST=INTERPRETED, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return merge_splits(space, query.dtype, lengths, GROUP_TOKENS)
