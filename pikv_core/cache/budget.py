"""A cache's budget: a share of the tokens seen, tokens per head, or bytes of the whole cache."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
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

    def resolve(self, shape: Shape, codecs: Sequence[Codec], num_columns: int) -> Budget:
        """Return the budget in tokens where it is in bytes, by the measured bytes of the codec of each layer.

        num_columns: float32 statistics that stay with each token, beside its position.
        """
        if not isinstance(self.value, str):
            return self
        total = parse_bytes(self.value)
        assert total is not None
        per_head = total // (shape.batch * shape.num_kv_heads)
        metadata = 4 * (1 + num_columns)
        plain = 2 * shape.head_dim * shape.dtype.itemsize + metadata
        waits = [4 * len(codec.columns) for codec in codecs]
        encoded = [_bytes_per_token(codec, shape) + metadata for codec in codecs]

        def needed(num_tokens: int) -> int:
            """Bytes of one head in all layers; the newest tokens wait in full precision until a unit is encoded."""
            need = 0.0
            for codec, each, more in zip(codecs, encoded, waits):
                waiting = 0 if codec.unit_tokens == 1 else codec.residual + codec.unit_tokens - 1
                need += min(num_tokens, waiting) * (plain + more) + max(0, num_tokens - waiting) * each
            return math.ceil(need)

        tokens = bisect.bisect_right(range(1 + per_head), per_head, key=needed) - 1
        if tokens < 1:
            least = needed(1) * shape.batch * shape.num_kv_heads
            raise PiKVError(
                f"a budget of {self.value} holds no token: one token per head takes {least:,} bytes in the whole cache",
                hint="raise --budget, or give it as a share or in tokens",
            )
        return Budget(tokens)

    def tokens(self, num_seen: torch.Tensor) -> torch.Tensor:
        """Return the tokens per head [B] allowed after `num_seen` [B]; at least 1."""
        return torch.tensor([self.of(count) for count in num_seen.tolist()], dtype=torch.int64)

    def of(self, num_seen: int) -> int:
        """Return the tokens per head allowed after so many; at least 1."""
        if isinstance(self.value, float):
            return max(1, int(num_seen * self.value + 1e-6))
        assert isinstance(self.value, int)
        return self.value


def _bytes_per_token(codec: Codec, shape: Shape) -> float:
    """Measure what the codec makes of one unit of one head, codes and scales."""
    unit = codec.unit_tokens
    zeros = torch.zeros(1, shape.num_kv_heads, unit, shape.head_dim, dtype=shape.dtype)
    encoded = codec.encode(zeros, zeros, torch.zeros(zeros.shape[:3], dtype=torch.int32))
    return sum(x.numel() * x.element_size() for x in encoded.values()) / (unit * shape.num_kv_heads)
