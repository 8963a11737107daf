"""Fidelity by importance: the more attention a token has had, the more bits it gets (PiKV's pyramid compressor)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec, sees_alike, units_of_pages
from pikv_core.compression.kivi import decode_blocks, encode_blocks
from pikv_core.observation import ALL, Rows

if TYPE_CHECKING:
    import torch

    from pikv_kernels.partial_attention import Partial

BLOCK_TOKENS = 64  # of one level in a unit
FULL_BITS = 16  # of a number that compression_ratio 1 stands for
SCALE_BITS = 32 / BLOCK_TOKENS  # of a number's share of float16 scale and zero


@CODECS.register("levels")
@dataclass(frozen=True)
class Levels(Codec):
    """Quantise tokens as KIVI does, level by level of accumulated attention, each level with fewer bits.

    A unit holds 64 tokens of every level, the most important first. num_levels: 1 gives all tokens the same bits.
    decay: bits of a level over those of the level before. compression_ratio: bytes over those of 16-bit numbers, scales
    included, met as nearly as whole bits of 1 to 16 can. residual: newest tokens kept in full precision.
    """

    columns: ClassVar[tuple[str, ...]] = ("importance",)
    sorted_by: ClassVar[str | None] = "importance"
    num_levels: Annotated[int, Field(ge=1, le=8)] = 3
    decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    compression_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    residual: Annotated[int, Field(ge=0)] = 32

    @property
    def unit_tokens(self) -> int:
        return self.num_levels * BLOCK_TOKENS

    @property
    def observes(self) -> int:
        return ALL

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of each level's codes, the most important first."""
        return level_bits(self.num_levels, self.decay, self.compression_ratio)

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        columns["importance"].add_(rows.column_sums())

    def encode(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = (-1, self.num_levels, BLOCK_TOKENS)
        parts = [x.unflatten(2, shape) for x in (keys, values, position)]
        encoded = {}
        for level, bits in enumerate(self.bits):
            level_keys, level_values, level_position = (x.select(3, level).flatten(2, 3) for x in parts)
            blocks = encode_blocks(level_keys, level_values, level_position, BLOCK_TOKENS, bits)
            for name, x in blocks.items():
                encoded[f"level{level}_{name}"] = x
        return encoded

    def decode(
        self, encoded: dict[str, torch.Tensor], position: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        levels = [decode_blocks(_blocks(encoded, level), bits, dtype) for level, bits in enumerate(self.bits)]
        keys, values = (
            torch.stack([x.unflatten(2, (-1, BLOCK_TOKENS)) for x in kind], dim=3).flatten(2, 4)
            for kind in zip(*levels)
        )
        return keys, values

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
        from pikv_kernels.backends import choose_for_newest

        if not sees_alike(query, visible) or choose_for_newest("attend_codes", query, _first(encoded)) == "torch":
            return super().attend(query, encoded, position, visible, scale, softcap, with_probs)
        return self._attend_by_level(query, encoded, None, visible, scale, softcap, with_probs)

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
        from pikv_kernels.backends import choose_for_newest

        if choose_for_newest("attend_codes", query, _first(encoded)) == "torch":
            return None
        units = units_of_pages(pages, page_tokens // self.unit_tokens)
        return self._attend_by_level(query, encoded, units, visible, scale, softcap, False)

    def _attend_by_level(
        self,
        query: torch.Tensor,
        encoded: dict[str, torch.Tensor],
        units: torch.Tensor | None,
        visible: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        with_probs: bool,
    ) -> Partial:
        """Attend over each level's blocks, of which every unit has one, and merge."""
        from pikv_kernels.attend_codes import attend_codes
        from pikv_kernels.merge_partials import join_partials

        parts = []
        for level, bits in enumerate(self.bits):
            seen = visible
            if visible is not None:
                seen = visible.unflatten(-1, (-1, self.num_levels, BLOCK_TOKENS))[..., level, :].flatten(-2)
            blocks = _blocks(encoded, level)
            parts.append(attend_codes(query, blocks, bits, seen, scale, softcap, with_probs, units))
        part = join_partials(parts)
        if part.probs is None:
            return part
        by_level = part.probs.unflatten(-1, (self.num_levels, -1, BLOCK_TOKENS))
        return part._replace(probs=by_level.transpose(-3, -2).flatten(-3))


def _blocks(encoded: Mapping[str, torch.Tensor], level: int) -> dict[str, torch.Tensor]:
    """Return one level's blocks as `encode_blocks` names them."""
    prefix = f"level{level}_"
    return {name.removeprefix(prefix): x for name, x in encoded.items() if name.startswith(prefix)}


def _first(encoded: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return encoded["level0_key_codes"]


@cache
def level_bits(num_levels: int, decay: float, compression_ratio: float) -> tuple[int, ...]:
    """Return whole bits in 1..16 near b·decay^level, b such that mean and scales come nearest to the ratio of 16."""
    mean = max(1.0, compression_ratio * FULL_BITS - SCALE_BITS)
    falling = [decay**level for level in range(num_levels)]
    exact = mean * num_levels / sum(falling)

    def rounded(first: float) -> tuple[int, ...]:
        return tuple(min(FULL_BITS, max(1, round(first * share))) for share in falling)

    def distance(first: float) -> tuple[float, float]:
        return abs(sum(rounded(first)) / num_levels - mean), abs(first - exact)

    return rounded(min((exact * step / 1000 for step in range(500, 2001)), key=distance))
