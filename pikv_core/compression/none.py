"""No compression: tokens stay as the model made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec

if TYPE_CHECKING:
    import torch


@CODECS.register("none")
@dataclass(frozen=True)
class Plain(Codec):
    """Keep keys and values as they are, token by token."""

    @property
    def unit_tokens(self) -> int:
        return 1

    @property
    def residual(self) -> int:
        return 0

    def encode(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"keys": keys, "values": values}

    def decode(
        self, encoded: dict[str, torch.Tensor], position: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return encoded["keys"], encoded["values"]
