"""A cache's budget: a share of the tokens seen, tokens per head, or bytes of the whole cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pikv_core.compression.base import Codec
from pikv_core.errors import PiKVError
from pikv_core.schema import parse_bytes


@dataclass(frozen=True)
class Shape:
    """Sizes that turn bytes into tokens: layers, batch rows, key/value heads, head dim; `dtype` of the model."""

    num_layers: int
    batch: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Budget:
    """`value`: a float is a share of the tokens seen (1.0 never evicts), an int tokens per head, a string bytes."""

    value: float | int | str = 1.0

    @property
    def limits(self) -> bool:
        """Whether anything is ever over this budget."""
        return self.value != 1.0 or not isinstance(self.value, float)

    def resolve(self, shape: Shape, codec: Codec, num_columns: int) -> Budget:
        """Return the budget in tokens where it is in bytes, by the codec's measured bytes."""
        if not isinstance(self.value, str):
            return self
        total = parse_bytes(self.value)
        assert total is not None
        per_head = total // (shape.num_layers * shape.batch * shape.num_kv_heads)
        metadata = 4 * (1 + num_columns)
        plain = 2 * shape.head_dim * shape.dtype.itemsize + metadata
        zeros = torch.zeros(1, 1, codec.unit_tokens, shape.head_dim, dtype=shape.dtype)
        unit_bytes = sum(x.numel() * x.element_size() for x in codec.encode(zeros, zeros).values())
        encoded = unit_bytes / codec.unit_tokens + metadata
        # The newest tokens wait in full precision until a unit of them is encoded.
        waiting = codec.residual + codec.unit_tokens - 1
        tokens = per_head // plain if codec.unit_tokens == 1 else 0
        if codec.unit_tokens > 1:
            tokens = min(per_head // plain, waiting) + int(max(0, per_head - waiting * plain) // encoded)
        if tokens < 1:
            raise PiKVError(
                f"a budget of {self.value} holds no token: one token per head takes "
                f"{plain * shape.num_layers * shape.batch * shape.num_kv_heads:,} bytes in the whole cache",
                hint="raise --budget, or give it as a share or in tokens",
            )
        return Budget(tokens)

    def tokens(self, num_seen: torch.Tensor) -> torch.Tensor:
        """Return the tokens per head [B] allowed after `num_seen` [B]; at least 1."""
        if isinstance(self.value, float):
            return (num_seen * self.value + 1e-6).long().clamp(min=1)
        assert isinstance(self.value, int)
        return torch.full_like(num_seen, self.value)
