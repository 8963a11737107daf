"""Low rank, trained, then KIVI with 4-bit codes over what is left of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec
from pikv_core.compression.int4 import Int4
from pikv_core.compression.trained_low_rank import TrainedLowRank


@CODECS.register("lora-int4")
@dataclass(frozen=True)
class LoRAInt4(TrainedLowRank):
    """Store 4 bits a number and the scales; group, residual: as of `int4`."""

    unfitted: ClassVar[tuple[str, ...]] = ("group", "residual")
    group: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    residual: Annotated[int, Field(ge=0)] = 32

    def codes(self) -> Codec:
        return Int4(self.group, self.residual)
