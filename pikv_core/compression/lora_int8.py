"""Low rank, trained, then KIVI with 8-bit codes over what is left of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec
from pikv_core.compression.int8 import Int8
from pikv_core.compression.trained_low_rank import TrainedLowRank


@CODECS.register("lora-int8")
@dataclass(frozen=True)
class LoRAInt8(TrainedLowRank):
    """Store 8 bits a number and the scales; group, residual: as of `int8`."""

    unfitted: ClassVar[tuple[str, ...]] = ("group", "residual")
    group: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    residual: Annotated[int, Field(ge=0)] = 32

    def codes(self) -> Codec:
        return Int8(self.group, self.residual)
