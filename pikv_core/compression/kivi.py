"""KIVI's layout of quantised keys and values (arXiv 2402.02750), for any number of bits.

Keys are quantised per channel over the tokens of a block, values per token over groups of channels. Shapes: B batch,
G key/value heads, N tokens, U blocks, D head dim, C channel groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pikv_core.compression.base import Codec, sees_alike, units_of_pages
from pikv_core.compression.empty_slots import fill_empty
from pikv_core.errors import PiKVError

if TYPE_CHECKING:
    import torch

    from pikv_kernels.partial_attention import Partial


class Kivi(Codec):
    """Store packed codes with float16 scales and zero points; units are encoded once and never requantised.

    bits: of a code. group: tokens of a unit, and most channels of a value group.
    """

    bits: ClassVar[int]
    group: int

    @property
    def unit_tokens(self) -> int:
        return self.group

    def encode(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> dict[str, torch.Tensor]:
        return encode_blocks(keys, values, position, self.group, self.bits)

    def decode(
        self, encoded: dict[str, torch.Tensor], position: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return decode_blocks(encoded, self.bits, dtype)

    def attend(
        self,
        query: torch.Tensor,
        encoded: dict[str, torch.Tensor],
        position: torch.Tensor,
        visible: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        with_probs: bool,
    ) -> Partial:
        from pikv_kernels.attend_codes import attend_codes, choose_for_codes

        if sees_alike(query, visible) and choose_for_codes(query, encoded, self.bits) != "torch":
            return attend_codes(query, encoded, self.bits, visible, scale, softcap, with_probs)
        return super().attend(query, encoded, position, visible, scale, softcap, with_probs)

    def attend_pages(
        self,
        query: torch.Tensor,
        encoded: dict[str, torch.Tensor],
        pages: torch.Tensor,
        page_tokens: int,
        visible: torch.Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Partial | None:
        from pikv_kernels.attend_codes import attend_codes, choose_for_codes

        if choose_for_codes(query, encoded, self.bits) == "torch":
            return None
        units = units_of_pages(pages, page_tokens // self.group)
        return attend_codes(query, encoded, self.bits, visible, scale, softcap, units=units)


def encode_blocks(
    keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, block_tokens: int, bits: int
) -> dict[str, torch.Tensor]:
    """Encode keys, values [B,G,N,D] at `position` [B,G,N] (-1: empty slot) in blocks of `block_tokens` tokens.

    Returns key codes [B,G,U,D,·] with scale and zero [B,G,U,D], value codes [B,G,U,block_tokens,·] with scale and zero
    [B,G,U,block_tokens,C]. Raises PiKVError where a value is not finite or out of float16's range, or D cannot be
    packed.
    """
    from pikv_kernels.pack_bits import grain
    from pikv_kernels.quantize_kv import quantize_kv

    for D in (keys.shape[-1], values.shape[-1]):
        if D % grain(bits):
            raise PiKVError(
                f"codes of {bits} bits need a head dim that is a multiple of {grain(bits)}, got {D}",
                hint="use codec 'int8', which takes any head dim",
            )
    keys, values = (fill_empty(x, position, block_tokens) for x in (keys, values))
    codes = quantize_kv(keys, values, bits, block_tokens, group_channels(values.shape[-1], block_tokens))
    for kind in ("key", "value"):
        if not (codes[f"{kind}_scale"].isfinite().all() and codes[f"{kind}_zero"].isfinite().all()):
            raise PiKVError(
                f"the {kind}s hold NaN, infinity or numbers beyond float16's 65504, which codes cannot represent",
                hint="run with codec 'none' to see whether the model's own numbers are finite",
            )
    return codes


def decode_blocks(encoded: dict[str, torch.Tensor], bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [B,G,N,D] in `dtype`, given what `encode_blocks` returned."""
    from pikv_kernels.attend_codes import decode

    return decode(encoded, bits, dtype)


def group_channels(head_dim: int, most: int) -> int:
    """Return the channels of a value group: the largest divisor of the head dim up to `most`."""
    return next(channels for channels in range(min(most, head_dim), 0, -1) if head_dim % channels == 0)
