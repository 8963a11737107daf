"""No compression: tokens stay as the model made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec, sees_alike

if TYPE_CHECKING:
    import torch

    from pikv_kernels.partial_attention import Partial


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
        from pikv_kernels.attend_tokens import attend_tokens
        from pikv_kernels.partial_attention import partial_attention

        attend = attend_tokens if sees_alike(query, visible) else partial_attention
        return attend(query, encoded["keys"], encoded["values"], visible, scale, softcap, with_probs)

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
        from pikv_kernels.attend_tokens import attend_pages, choose_for_tokens

        keys, values = encoded["keys"], encoded["values"]
        chosen = choose_for_tokens("attend_pages", query, keys, values)
        if chosen == "torch":
            return None
        return attend_pages(query, keys, values, pages, page_tokens, visible, scale, softcap, backend=chosen)
