"""Attention of one new token over keys and values in KIVI's codes (arXiv 2402.02750), plainly, by numba or Triton.

Shapes: B batch, G key/value heads, R query rows of a head's group, U units of T tokens, S = U·T, K units that are read,
D channels of a key, V of a value, C groups of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pikv_kernels.backends import choose_for_newest
from pikv_kernels.decode_codes import decode_codes, what_hinders
from pikv_kernels.pack_bits import unpack
from pikv_kernels.partial_attention import Partial, partial_attention
from pikv_kernels.quantize_kv import dequantize


def attend_codes(
    query: torch.Tensor,
    codes: Mapping[str, torch.Tensor],
    bits: int,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    with_probs: bool = False,
    units: torch.Tensor | None = None,
    backend: str | None = None,
) -> Partial:
    """Attend query [B,G,R,D] over packed codes; `visible` bool [B,1|G,1,S], None for all.

    codes: key_codes [B,G,U,D,·] with key_scale and key_zero [B,G,U,D], value_codes [B,G,U,T,·] with value_scale and
    value_zero [B,G,U,T,C]. units: int64 [B,G,K] to read, without probs, where U and above are nothing; None for all.
    backend: "torch", "numba" or "triton".
    """
    assert units is None or not with_probs
    backends = {"torch": define_attend_codes, "numba": _by_numba, "triton": decode_codes}
    attend = backends[choose_for_codes(query, codes, bits, backend)]
    return attend(query, codes, bits, visible, scale, softcap, with_probs, units)


def choose_for_codes(
    query: torch.Tensor, codes: Mapping[str, torch.Tensor], bits: int, backend: str | None = None
) -> str:
    """Return what attends over codes; see `choose_for_newest`."""
    return choose_for_newest("attend_codes", query, codes["key_codes"], backend, what_hinders(query, codes, bits))


def define_attend_codes(
    query: torch.Tensor,
    codes: Mapping[str, torch.Tensor],
    bits: int,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    with_probs: bool = False,
    units: torch.Tensor | None = None,
) -> Partial:
    """Do as `attend_codes` does, plainly: over what the codes stand for."""
    U, T = codes["value_codes"].shape[2:4]
    if units is not None:
        is_held, units = (units < U)[..., None].expand(-1, -1, -1, T), units.clamp(max=U - 1)
        codes = {name: x.gather(2, _index(units, x.shape[3:])) for name, x in codes.items()}
        if visible is not None:
            by_unit = visible[:, :, 0].unflatten(-1, (-1, T)).expand(-1, units.shape[1], -1, -1)
            is_held = is_held & by_unit.gather(2, _index(units, (T,)))
        visible = is_held.flatten(2)[:, :, None]
    return partial_attention(query, *decode(codes, bits, query.dtype), visible, scale, softcap, with_probs)


def _index(units: torch.Tensor, inner: Sequence[int]) -> torch.Tensor:
    return units.view(*units.shape, *[1] * len(inner)).expand(*units.shape, *inner)


def decode(codes: Mapping[str, torch.Tensor], bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys [B,G,S,D] and values [B,G,S,V] in `dtype`."""
    # Transposed as bytes, a quarter of the traffic of float32.
    key_codes = unpack(codes["key_codes"], bits).transpose(-1, -2).contiguous()
    keys = dequantize(key_codes, codes["key_scale"][..., None, :], codes["key_zero"][..., None, :], dtype)
    scale, zero = codes["value_scale"], codes["value_zero"]
    value_codes = unpack(codes["value_codes"], bits).unflatten(-1, (scale.shape[-1], -1))
    values = dequantize(value_codes, scale[..., None], zero[..., None], dtype)
    return keys.flatten(2, 3), values.flatten(-2).flatten(2, 3)


def _by_numba(
    query: torch.Tensor,
    codes: Mapping[str, torch.Tensor],
    bits: int,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    with_probs: bool,
    units: torch.Tensor | None,
) -> Partial:
    from pikv_kernels.cpu_attend_codes import make_kernel
    from pikv_kernels.cpu_heads import attend_heads, by_head

    U, T, C = codes["value_scale"].shape[2:]
    V = codes["value_codes"].shape[4] * 8 // bits
    kernel = make_kernel(query.shape[2], query.shape[3], V, C, T, bits)
    stored = [by_head(codes[f"{kind}_{part}"]) for kind in ("key", "value") for part in ("codes", "scale", "zero")]
    stored[4:] = [x.reshape(*x.shape[:2], T * C) for x in stored[4:]]
    return attend_heads(kernel, query, stored, units, U, U * T, V, visible, scale, softcap, with_probs)
