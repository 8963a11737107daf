"""A model as a cache sees it: bytes of keys and values per token, and the work of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pikv_core.errors import PiKVError
from pikv_core.schema.base import parse_bytes
from pikv_core.simulation.cost.config import Config
from pikv_core.simulation.cost.weights import attention_shape, num_active_params

KvDtype = Literal["bfloat16", "float8"]
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float8": 1}


@dataclass(frozen=True)
class KvModel:
    """Sizes that bytes and FLOPs follow from; layers with a sliding window are counted as if they kept every token."""

    name: str
    kv_dtype: KvDtype
    num_layers: int
    num_heads: int  # of queries
    qk_head_dim: int
    v_head_dim: int
    bytes_per_token: int  # keys and values of all layers; of latent attention, the latent and the rotary key
    num_active_params: int  # weights that one token is multiplied with, see weights.py

    @staticmethod
    def load(name: str, kv_dtype: KvDtype = "bfloat16") -> KvModel:
        """Read a config.json, that of a folder, or a model of the built-in list; raise PiKVError naming what lacks."""
        config = Config.load(name)
        if kv_dtype not in DTYPE_BYTES:
            raise PiKVError(f"kv_dtype: unknown '{kv_dtype}'", hint=f"it is one of: {', '.join(DTYPE_BYTES)}")
        shape = attention_shape(config)
        num_layers = config.whole("num_hidden_layers", least=1)
        return KvModel(
            name=name,
            kv_dtype=kv_dtype,
            num_layers=num_layers,
            num_heads=shape.num_heads,
            qk_head_dim=shape.qk_head_dim,
            v_head_dim=shape.v_head_dim,
            bytes_per_token=num_layers * shape.kept_per_token * DTYPE_BYTES[kv_dtype],
            num_active_params=num_active_params(config),
        )

    @property
    def attention_flops(self) -> int:
        """Return the factor of L² in the work of a prompt: two products with half of L x L, by layer and head."""
        return self.num_layers * self.num_heads * (self.qk_head_dim + self.v_head_dim)

    @property
    def attention_tokens(self) -> float:
        """Return how far into a prompt attention is as much work for a token as the weights."""
        return self.num_active_params / self.attention_flops

    def block_bytes(self, block_tokens: int) -> int:
        return self.bytes_per_token * block_tokens

    def blocks(self, text: str, block_tokens: int) -> int:
        """Return how many whole blocks fit into `64GiB`; raise PiKVError where none does or the text is no size."""
        capacity_bytes = parse_bytes(text)
        if capacity_bytes is None:
            raise PiKVError(f"capacity: expected bytes, got '{text}'", hint="for example 64GiB")
        block_bytes = self.block_bytes(block_tokens)
        if capacity_bytes < block_bytes:
            raise PiKVError(
                f"capacity: '{text}' holds no block of {self.name}: {block_tokens} tokens take {block_bytes:,} bytes",
                hint="give more bytes, or a number of blocks",
            )
        return capacity_bytes // block_bytes
