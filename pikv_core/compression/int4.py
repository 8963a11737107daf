"""KIVI with 4-bit codes (arXiv 2402.02750): keys per channel over groups of tokens, values per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from pikv_core.compression import CODECS
from pikv_core.compression.kivi import Kivi


@CODECS.register("int4")
@dataclass(frozen=True)
class Int4(Kivi):
    """Store two numbers a byte, 4.5 bits each with the scales at 64 channels or more.

    group: tokens of a key group, and most channels of a value group (the largest divisor of the head dim up to it).
    residual: newest tokens kept in full precision before they are encoded; KIVI's 128 leaves little to encode in a
    budget of a few hundred tokens, and 32 keep most of what it gains.
    """

    bits: ClassVar[int] = 4
    group: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    residual: Annotated[int, Field(ge=0)] = 32
