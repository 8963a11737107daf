"""Attention of one new token over keys that are rebuilt from coordinates and rotated, by the definition or numba.

Shapes: B batch, G key/value heads, R query rows of a head's group, S stored tokens, K coordinates of a key, V of a
value, D head dim, P channels that rotate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from pikv_kernels.attend_codes import decode
from pikv_kernels.backends import choose_for_newest
from pikv_kernels.partial_attention import Partial, partial_attention

BLOCK_TOKENS = 64


class Rotation(NamedTuple):
    """How keys rotate: channels `pairs` [2,P/2] together, x cos - y sin and y cos + x sin, and all others pass.

    turns: float32 [·,P], for each position the cosines and then the sines of the pairs' angles. position: of the
    tokens, [B,1|G,S], below 0 where none is seen.
    """

    pairs: torch.Tensor
    turns: torch.Tensor
    position: torch.Tensor


def attend_rebuilt(
    query: torch.Tensor,
    stored: Mapping[str, torch.Tensor],
    bits: int | None,
    up: torch.Tensor,
    rotation: Rotation,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    with_probs: bool = False,
    backend: str | None = None,
) -> Partial:
    """Attend query [B,G,R,D] over keys up · x, rotated, and over values [B,G,S,V]; the x are coordinates [B,G,S,K].

    stored: these as `keys` and `values`, bits None, or in KIVI's codes of 1, 2, 4 or 8 bits (see `attend_codes`).
    up: float32 [B|1,G,D,K]. visible: bool [B,1|G,1,S], None for all. backend: "torch" or "numba".
    """
    first = stored["keys" if bits is None else "key_codes"]
    if choose_for_newest("attend_rebuilt", query, first, backend) == "numba":
        return _by_numba(query, stored, bits, up, rotation, visible, scale, softcap, with_probs)
    keys, values = (stored["keys"], stored["values"]) if bits is None else decode(stored, bits, query.dtype)
    rebuilt = keys.float() @ up.transpose(-1, -2)
    (one, other), turn = rotation.pairs, rotation.turns[rotation.position.clamp(min=0).long()]
    (cos, sin), x, y = turn.chunk(2, dim=-1), rebuilt[..., one], rebuilt[..., other]
    rebuilt[..., one], rebuilt[..., other] = x * cos - y * sin, y * cos + x * sin
    return partial_attention(query, rebuilt, values.to(query.dtype), visible, scale, softcap, with_probs)


def _by_numba(
    query: torch.Tensor,
    stored: Mapping[str, torch.Tensor],
    bits: int | None,
    up: torch.Tensor,
    rotation: Rotation,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    with_probs: bool,
) -> Partial:
    from pikv_kernels.cpu_attend_rebuilt import make_kernel
    from pikv_kernels.cpu_heads import attend_heads, by_head

    (B, G, R, D), K = query.shape, up.shape[-1]
    pairs, turns, position = rotation
    is_passed = torch.ones(D, dtype=torch.bool)
    is_passed[pairs.flatten()] = False
    order = torch.cat([pairs.flatten(), is_passed.nonzero()[:, 0]])  # the same for queries and keys changes no product
    basis = up[..., order, :].transpose(-1, -2).expand(B, G, K, D)
    parts: list[tuple[np.ndarray, ...]]
    if bits is None:
        V, kind = stored["values"].shape[3], str(stored["keys"].dtype).removeprefix("torch.")
        kernel = make_kernel(R, D, pairs.numel(), K, V, BLOCK_TOKENS, kind)
        parts = [(by_head(stored[name]),) for name in ("keys", "values")]
    else:
        T, C = stored["value_scale"].shape[3:]
        V = stored["value_codes"].shape[4] * 8 // bits
        kernel = make_kernel(R, D, pairs.numel(), K, V, T, bits, C)
        dealt = {name: stored[f"value_{name}"].flatten(3) for name in ("scale", "zero")}
        parts = [
            tuple(by_head(stored[f"key_{part}"]) for part in ("codes", "scale", "zero")),
            (by_head(stored["value_codes"]), by_head(dealt["scale"]), by_head(dealt["zero"])),
        ]
    S = position.shape[2]
    own_position = position.int().flatten(0, 1).contiguous().numpy()
    arrays: list[Any] = [*parts, by_head(basis), turns.numpy(), own_position, G // position.shape[1]]
    return attend_heads(kernel, query[..., order], arrays, None, S, S, V, visible, scale, softcap, with_probs)
