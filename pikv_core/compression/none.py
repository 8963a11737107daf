"""No compression: tokens stay as the model made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec

if TYPE_CHECKING:
    import torch


@CODECS.register("none")
@dataclass(frozen=True)
class Plain(Codec):
    """Keep keys and values as they are, token by token."""

    unit_tokens: ClassVar[int] = 1
    residual: ClassVar[int] = 0

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"keys": keys, "values": values}

    def decode(
        self, encoded: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return encoded["keys"], encoded["values"]
