"""Pack codes of 1 to 16 bits into bytes: exactly `bits` bits a code, and nothing interleaves at unpacking.

A code is cut into parts of 8, 4, 2 and 1 bits (6 = 4 + 2, lowest bits first). A part of w bits packs 8/w runs of codes
into one run of bytes: at 4 bits, codes d and d + L/2 share byte d.
"""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes [...,L] below 2^bits as bytes [...,L·bits/8]; L is a multiple of `grain(bits)`."""
    assert codes.shape[-1] % grain(bits) == 0
    packed = []
    for shift, width in parts_of(bits):
        part = (codes >> shift & 2**width - 1).to(torch.uint8)
        first, *others = part.chunk(8 // width, dim=-1)
        for run, other in enumerate(others, start=1):
            first = first | other << run * width
        packed.append(first)
    return torch.cat(packed, dim=-1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes [...,L] (uint8 up to 8 bits, int32 above), given what `pack` returned."""
    parts = parts_of(bits)
    length = packed.shape[-1] * 8 // bits
    runs = packed.split([length * width // 8 for _, width in parts], dim=-1)
    # Strided runs of a few bytes would be shifted byte by byte.
    codes = [_unpack_part(run.contiguous(), width) for run, (_, width) in zip(runs, parts)]
    if bits > 8:
        codes = [code.int() for code in codes]
    whole = codes[0]
    for code, (shift, _) in zip(codes[1:], parts[1:]):
        whole = whole | code << shift
    return whole


def grain(bits: int) -> int:
    """Return the number of codes that a packed length must be a multiple of."""
    return max(8 // width for _, width in parts_of(bits))


def parts_of(bits: int) -> list[tuple[int, int]]:
    """Return (shift, width) of a code's parts."""
    assert 1 <= bits <= 16
    parts, shift = [], 0
    while shift < bits:
        width = min(8, 1 << (bits - shift).bit_length() - 1)
        parts.append((shift, width))
        shift += width
    return parts


def _unpack_part(packed: torch.Tensor, width: int) -> torch.Tensor:
    mask = 2**width - 1
    runs = [packed >> shift & mask for shift in range(0, 8, width)]
    return torch.cat(runs, dim=-1) if len(runs) > 1 else packed
