"""Fidelity by importance: the more attention a token has had, the more bits it gets (PiKV's pyramid compressor)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec
from pikv_core.compression.kivi import decode_blocks, encode_blocks
from pikv_core.observation import ALL, Rows

if TYPE_CHECKING:
    import torch

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

        levels = []
        for level, bits in enumerate(self.bits):
            prefix = f"level{level}_"
            of_level = {name.removeprefix(prefix): x for name, x in encoded.items() if name.startswith(prefix)}
            levels.append(decode_blocks(of_level, bits, dtype))
        keys, values = (
            torch.stack([x.unflatten(2, (-1, BLOCK_TOKENS)) for x in kind], dim=3).flatten(2, 4)
            for kind in zip(*levels)
        )
        return keys, values


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
