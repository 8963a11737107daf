"""What a compressor holds: a sequence's tokens in live storage, some exactly, the others as a method says.

Shapes: B batch, G key/value heads, S tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pikv_core.cache.layer import CacheLayer
from pikv_core.classic.lone_layer import in_order, lone_layer
from pikv_core.compression.base import Codec
from pikv_core.compression.measured import relative_error
from pikv_core.compression.none import Plain
from pikv_core.scheduling.base import Evictor, Policy, Tokens


@dataclass(frozen=True)
class MostImportant(Evictor):
    """Keep the tokens of the largest importance, which the caller gives: FastV's rule (arXiv 2403.06764)."""

    name: ClassVar[str] = "fastv"
    columns: ClassVar[tuple[str, ...]] = ("importance",)

    def score(self, tokens: Tokens) -> torch.Tensor:
        return tokens.columns["importance"]


@dataclass(frozen=True)
class Held:
    """Parts of a sequence, each in a layer of its own; places: where in the sequence each part's tokens stand."""

    parts: list[tuple[CacheLayer, torch.Tensor]]

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        importance: torch.Tensor,
        is_exact: torch.Tensor,
        codec: Codec,
        keep_ratio: float,
    ) -> Held:
        """Hold keys, values [B,G,S,D]: the tokens of `is_exact` [S] as they are, the others under `codec`.

        Of these, the ones of the least importance [B,S] go, until `keep_ratio` of all tokens is left.
        """
        num_kept = max(1, round(keep_ratio * keys.shape[2])) - int(is_exact.sum())
        parts = []
        for places, own in ((is_exact.nonzero()[:, 0], Plain()), ((~is_exact).nonzero()[:, 0], codec)):
            drops = own is codec and num_kept < len(places)
            if len(places) == 0 or (drops and num_kept <= 0):
                continue
            layer = lone_layer(MostImportant() if drops else Policy(), num_kept if drops else 1.0, own)
            layer.append(keys[:, :, places], values[:, :, places], {"importance": importance[:, places].float()})
            parts.append((layer, places))
        return cls(parts)

    @property
    def resident_bytes(self) -> int:
        """Bytes of live storage: codes, scales, positions."""
        return sum(layer.resident_bytes for layer, _ in self.parts)

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys and values [B,G,S,D], decoded, and positions [B,G,S], by position; S: tokens that are left."""
        found = []
        for layer, places in self.parts:
            keys, values, position = layer.retrieve()
            found.append((keys, values, places[position.long()]))
        keys, values, position = (torch.cat(tensors, dim=2) for tensors in zip(*found))
        return in_order(keys, values, position)

    def errors(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[float, float]:
        """Return ‖held − given‖ / ‖given‖ of keys and of values [B,G,S,D]; tokens that were dropped count as zeros."""
        *held, position = self.tokens()
        places = position[..., None].expand_as(held[0])
        found = [torch.zeros_like(keys).scatter(2, places, x) for x in held]
        return relative_error(found[0], keys), relative_error(found[1], values)
