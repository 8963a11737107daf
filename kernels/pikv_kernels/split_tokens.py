"""What attentions split over tokens share (flash-decoding): how many splits, their merging, the softmax rows.

Shapes: B batch, G key/value heads, R query rows of a head's group, S stored tokens, D head dim. Logits are in powers of
two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from pikv_kernels.backends import jit, tl, triton
from pikv_kernels.partial_attention import Partial

LOG2E = 1.4426950408889634
LEAST_CHANNELS = 16  # of a product on the matrix units
OVERHEAD_TILES = 2  # what starting and ending a program costs, in tiles of tokens
LEAST_SPLITS = 16  # that merging is compiled for
MOST_SPLITS = 128
PROBS_TOKENS = 1024


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
def cap(logits, softcap):
    """Return softcap · tanh(logits / softcap)."""
    return softcap - 2.0 * softcap / (1.0 + tl.exp2(logits * (2.8853900817779268 / softcap)))


@jit(do_not_specialize=["num_splits"])
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


@jit(do_not_specialize=["num_tokens"])
def _normalise(probs, lse, lengths, num_tokens, R, BLOCK: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    # One program a query row and block of tokens: probs [B·G·R,S] are logits until now, beyond the lengths anything.
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = num_tokens
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + row // R), num_tokens)
    at = probs + row * num_tokens + token
    logits = tl.load(at, mask=token < end, other=float("-inf"))
    total = tl.maximum(tl.load(lse + row) * 1.4426950408889634, -1.0e30)
    tl.store(at, tl.exp2(logits - total), mask=token < num_tokens)


class Workspace(NamedTuple):
    """What the programs of an attention write: outputs and log-sum-exps of splits, and logits where probs are wanted.

    partial: [B,G,R,splits,V]; partial_lse: [B,G,R,splits]; probs: [B,G,R,S].
    """

    split_tokens: int
    partial: torch.Tensor
    partial_lse: torch.Tensor
    probs: torch.Tensor | None

    @property
    def num_splits(self) -> int:
        return self.partial.shape[3]


def plan_splits(
    query: torch.Tensor, channels: int, num_tokens: int, launch: Launch, probs_tokens: int | None
) -> Workspace:
    """Return the memory of an attention of query [B,G,R,·] over some tokens, whose values have `channels`.

    probs_tokens: stored ones, with probs.
    """
    B, G, R, _ = query.shape
    slots = count_sms(query.device) * launch.programs_per_sm
    splits = count_splits(B * G, -(-num_tokens // launch.tile), slots)
    split_tokens = -(-num_tokens // splits // launch.tile) * launch.tile
    splits = -(-num_tokens // split_tokens)

    def empty(*last: int) -> torch.Tensor:
        return torch.empty(B, G, R, *last, dtype=torch.float32, device=query.device)

    return Workspace(
        split_tokens, empty(splits, channels), empty(splits), None if probs_tokens is None else empty(probs_tokens)
    )


def merge_splits(written: Workspace, dtype: torch.dtype, lengths: torch.Tensor | None) -> Partial:
    """Return output in `dtype`, natural log-sum-exp, and what the logits come to."""
    B, G, R, splits, V = written.partial.shape
    output = torch.empty(B, G, R, V, dtype=dtype, device=written.partial.device)
    lse = torch.empty(B, G, R, dtype=torch.float32, device=written.partial.device)
    sizes = {"D": V, "COLUMNS": next_power(V), "SPLITS": next_power(splits, LEAST_SPLITS)}
    num_warps = min(16, max(4, sizes["COLUMNS"] * sizes["SPLITS"] // 2048))
    _merge[(B * G * R,)](written.partial, written.partial_lse, output, lse, splits, **sizes, num_warps=num_warps)
    if written.probs is not None:
        S = written.probs.shape[3]
        _normalise[(B * G * R, triton.cdiv(S, PROBS_TOKENS))](
            written.probs, lse, lengths, S, R, BLOCK=PROBS_TOKENS, HAS_LENGTHS=lengths is not None, num_warps=4
        )
    return Partial(output, lse, written.probs)


def see_nothing(query: torch.Tensor, channels: int, num_tokens: int, with_probs: bool) -> Partial:
    """Return what query [B,G,R,·] gets of tokens none of which it sees, whose values have `channels`."""
    lse = torch.full(query.shape[:3], -torch.inf, device=query.device)
    probs = query.new_zeros(*query.shape[:3], num_tokens, dtype=torch.float32) if with_probs else None
    return Partial(query.new_zeros(*query.shape[:3], channels), lse, probs)


def mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    """Return the strides of a mask [B,1|G,...,S] over B and G, 0 where all heads share it."""
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0)
