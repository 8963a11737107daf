"""Move the kept tokens of every head to the front, in place and without a second copy of them.

Shapes: B batch, G key/value heads, S stored tokens, C kept tokens, D head dim or bytes of codes.
"""

from __future__ import annotations

import torch

from pikv_kernels.backends import choose, jit, tl
from pikv_kernels.split_tokens import next_power

CHUNK_TOKENS = 1024  # of the definition
BLOCK_TOKENS = 128
BLOCK_BYTES = 64  # of a token: a program moves these columns of a head's tokens, one block after the other


def compact(stored: torch.Tensor, keep: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """Move the tokens `keep` [B,G,C], ascending in every head, of `stored` [B,G,S,D] to the front; return [B,G,C,D].

    The result is a view of `stored`, whose later tokens are left undefined. Numbers are moved as bits, NaN too.
    """
    C = keep.shape[2]
    # As whole numbers, since torch's own gather changes the bits of a bfloat16 NaN.
    bits = stored.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.element_size()])
    if choose("compact", stored, backend) == "triton":
        if keep.numel():
            _move_on_gpu(bits, keep)
        return stored[:, :, :C]
    # An ascending list never points before its own place, so what is overwritten was moved already.
    for start in range(0, C, CHUNK_TOKENS):
        rows = keep[:, :, start : start + CHUNK_TOKENS, None].expand(-1, -1, -1, stored.shape[3])
        bits[:, :, start : start + rows.shape[2]] = bits.gather(2, rows)
    return stored[:, :, :C]


@jit
def _move(
    stored, keep, num_kept, G, stride_b, stride_g, stride_t,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program a key/value head and block of columns. Blocks of tokens are moved one after the other; the next
    # one, whose tokens lie behind what is written now, is read ahead.
    head = tl.program_id(0).to(tl.int64)
    column, offset = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    inside = (column < D)[None, :]
    stored += head // G * stride_b + head % G * stride_g
    keep += head * num_kept
    token = tl.load(keep + offset, mask=offset < num_kept, other=0)
    numbers = tl.load(
        stored + token[:, None] * stride_t + column[None, :], mask=(offset < num_kept)[:, None] & inside, other=0
    )
    for start in range(0, num_kept, BLOCK):
        place = start + offset
        coming = place + BLOCK
        token = tl.load(keep + coming, mask=coming < num_kept, other=0)
        ahead = tl.load(
            stored + token[:, None] * stride_t + column[None, :], mask=(coming < num_kept)[:, None] & inside, other=0
        )
        # Every thread has read this block before any writes over it.
        tl.debug_barrier()
        tl.store(
            stored + place[:, None] * stride_t + column[None, :], numbers, mask=(place < num_kept)[:, None] & inside
        )
        numbers = ahead


def _move_on_gpu(bits: torch.Tensor, keep: torch.Tensor) -> None:
    B, G, _, D = bits.shape
    assert bits.stride(3) == 1
    columns = min(next_power(D), BLOCK_BYTES // bits.element_size())
    _move[(B * G, -(-D // columns))](
        bits, keep.to(torch.int64).contiguous(), keep.shape[2], G, *bits.stride()[:3],
        D=D, COLUMNS=columns, BLOCK=BLOCK_TOKENS, num_warps=4, num_stages=1,
    )  # fmt: skip
