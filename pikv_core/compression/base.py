"""What a codec is: a representation of stored tokens that never changes which tokens exist."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch


class Codec(ABC):
    """Encode and decode keys and values [B,G,N,D] in units of `unit_tokens` consecutive tokens.

    unit_tokens: the grain of storage and of eviction; N is a multiple of it. residual: how many of the newest
    tokens stay in full precision before a unit is encoded. Encoded tensors have shape [B,G,N/unit_tokens,...].
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def unit_tokens(self) -> int: ...

    @property
    @abstractmethod
    def residual(self) -> int: ...

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def decode(self, encoded: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]: ...
