"""What splits that leave every rank all of a layer's key/value heads have in common."""

from __future__ import annotations

import torch

from pikv_core.compression.base import Codec


class AllHeads:
    """Hold all heads, of some of the tokens."""

    parts_of_heads = 1

    def first_head(self, num_kv_heads: int) -> int:
        return 0

    def own_heads(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return x

    def gather_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def codec(self, codec: Codec, num_kv_heads: int) -> Codec:
        return codec
