"""What attentions split over tokens share (flash-decoding): how many splits, their merging, the mass of tokens.

Shapes: B batch, G key/value heads, R query heads of a group, S stored tokens, D head dim. Logits are in powers of two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from pikv_kernels.backends import jit, tl, triton

LOG2E = 1.4426950408889634
LEAST_CHANNELS = 16  # of a product on the matrix units
OVERHEAD_TILES = 2  # what starting and ending a program costs, in tiles of tokens
MOST_SPLITS = 128
MASS_TOKENS = 512


class Launch(NamedTuple):
    """How a kernel is cut: tokens of a tile, warps of a program, tiles that are loaded ahead, programs at a time."""

    tile: int
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that registers and shared memory leave room for


@lru_cache(maxsize=4096)
def count_splits(num_heads: int, num_tiles: int, slots: int) -> int:
    """Return the number of splits that ends soonest: even waves of `slots` programs, each with a fixed cost."""

    def end(splits: int) -> int:
        return -(-num_heads * splits // slots) * (-(-num_tiles // splits) + OVERHEAD_TILES)

    return min(range(1, max(1, min(num_tiles, MOST_SPLITS)) + 1), key=end)


@lru_cache
def count_sms(device: torch.device) -> int:
    """Return the number of multiprocessors; the interpreter has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def next_power(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is not below either."""
    return max(least, 1 << (number - 1).bit_length())


@jit
def dot(a, b, UPCAST: tl.constexpr):
    """Multiply on the matrix units, or in float32 under the interpreter; float32 operands stay exact."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@jit
def _merge(partial, partial_lse, output, lse, num_splits, D: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    # One program a query head: partial [B·H, splits, D] with base-2 log-sum-exps [B·H, splits].
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, COLUMNS)
    lses = tl.load(partial_lse + row * num_splits + split, mask=split < num_splits, other=float("-inf"))
    highest = tl.maximum(tl.max(lses, 0), -1.0e30)
    share = tl.exp2(lses - highest)
    total = tl.sum(share, 0)
    rows = partial + (row * num_splits + split[:, None]) * D + column[None, :]
    parts = tl.load(rows, mask=(lses > float("-inf"))[:, None] & (column < D)[None, :], other=0.0)
    merged = tl.sum(parts * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(output + row * D + column, merged.to(output.dtype.element_ty), mask=column < D)
    tl.store(lse + row, tl.where(total > 0, (highest + tl.log2(total)) / 1.4426950408889634, float("-inf")))


@jit
def _mass(
    weights, tile_max, lse, lengths, mass, num_tokens, num_tiles,
    R: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    # One program a key/value head and block of tokens; weights [B·G, R, S] relative to their tile's maximum.
    head = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = num_tokens
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + head), num_tokens)
    seen = token < end
    total = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(R):
        row = head * R + r
        row_lse = tl.load(lse + row) * 1.4426950408889634
        weight = tl.load(weights + row * num_tokens + token, mask=seen, other=0.0).to(tl.float32)
        highest = tl.load(tile_max + row * num_tiles + token // TILE, mask=seen, other=-1.0e30)
        total += tl.where(row_lse > float("-inf"), weight * tl.exp2(highest - row_lse), 0.0)
    tl.store(mass + head * num_tokens + token, total, mask=token < num_tokens)


class Workspace(NamedTuple):
    """What the programs of an attention write: outputs and log-sum-exps of splits, and weights where mass is wanted.

    partial: [B,H,splits,D]; partial_lse: [B,H,splits]; weights: [B,G,R,S], relative to the maxima tile_max
    [B,G,R,tiles].
    """

    split_tokens: int
    partial: torch.Tensor
    partial_lse: torch.Tensor
    weights: torch.Tensor | None
    tile_max: torch.Tensor | None

    @property
    def num_splits(self) -> int:
        return self.partial.shape[2]


def plan_splits(
    query: torch.Tensor, num_groups: int, num_tokens: int, launch: Launch, mass_of: tuple[int, torch.dtype] | None
) -> Workspace:
    """Return the memory of an attention of query [B,H,D] over some tokens; mass_of: stored tokens, dtype of weights."""
    B, H, D = query.shape
    slots = count_sms(query.device) * launch.programs_per_sm
    splits = count_splits(B * num_groups, -(-num_tokens // launch.tile), slots)
    split_tokens = -(-num_tokens // splits // launch.tile) * launch.tile
    splits = -(-num_tokens // split_tokens)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=query.device)

    weights = tile_max = None
    if mass_of is not None:
        S, dtype = mass_of
        weights = empty(B, num_groups, H // num_groups, S, dtype=dtype)
        tile_max = empty(B, num_groups, H // num_groups, -(-S // launch.tile))
    return Workspace(split_tokens, empty(B, H, splits, D), empty(B, H, splits), weights, tile_max)


def merge_splits(
    written: Workspace, dtype: torch.dtype, lengths: torch.Tensor | None, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return output [B,H,D] in `dtype`, natural log-sum-exp [B,H], and mass [B,G,S] summed over a group, or None."""
    B, H, splits, D = written.partial.shape
    output = torch.empty(B, H, D, dtype=dtype, device=written.partial.device)
    lse = torch.empty(B, H, dtype=torch.float32, device=written.partial.device)
    sizes = {"D": D, "COLUMNS": next_power(D), "SPLITS": next_power(splits)}
    num_warps = min(16, max(4, sizes["COLUMNS"] * sizes["SPLITS"] // 2048))
    _merge[(B * H,)](written.partial, written.partial_lse, output, lse, splits, **sizes, num_warps=num_warps)
    if written.weights is None or written.tile_max is None:
        return output, lse, None
    B, G, R, S = written.weights.shape
    mass = torch.empty(B, G, S, dtype=torch.float32, device=output.device)
    _mass[(B * G, triton.cdiv(S, MASS_TOKENS))](
        written.weights, written.tile_max, lse, lengths, mass, S, written.tile_max.shape[-1],
        R=R, TILE=tile, BLOCK=MASS_TOKENS, HAS_LENGTHS=lengths is not None, num_warps=4,
    )  # fmt: skip
    return output, lse, mass


def mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    """Return the strides of a mask [B,1|G,S] over B and G, 0 where all heads share it."""
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0)
