"""What a codec is: a representation of stored tokens that never changes which tokens exist.

Shapes: B batch, G key/value heads, H query heads, N tokens, U units, D head dim, Q query rows of a head's group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pikv_core.observation import Observer

if TYPE_CHECKING:
    import torch

    from pikv_kernels.partial_attention import Partial


CHUNK_TOKENS = 1024  # decoded at a time on a CPU
MOST_GROUP = 32  # query heads that share a key/value head


@dataclass(frozen=True)
class LayerSamples:
    """What one layer computed on calibration text: queries [B,H,N,D], keys and values [B,G,N,D], rotated; position [N].

    scale: of the attention logits. rotary: the model's rotary embedding, or None.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    position: torch.Tensor
    scale: float
    rotary: Any


@dataclass(frozen=True)
class Fitted:
    """What calibration found: tensors by name, and notes for the manifest (ranks, errors, choices)."""

    tensors: dict[str, torch.Tensor]
    notes: dict[str, Any] = field(default_factory=dict)


class Codec(Observer, ABC):
    """Encode and decode keys and values [B,G,N,D] in units of `unit_tokens` consecutive tokens.

    unit_tokens: the grain of storage and of eviction; N is a multiple of it. residual: how many of the newest tokens
    stay in full precision before a unit is encoded (0 where unit_tokens is 1). Encoded tensors have shape
    [B,G,N/unit_tokens,...]. calibrated: it runs only after `fit`. sorted_by: a column of its own; tokens that are
    encoded together are then ranked by it, largest first, and dealt so that each unit holds equally many tokens of
    every level, the best level first; without it they come in the order of their positions.
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = False
    sorted_by: ClassVar[str | None] = None
    num_levels: int = 1

    @property
    @abstractmethod
    def unit_tokens(self) -> int: ...

    @property
    @abstractmethod
    def residual(self) -> int: ...

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode keys, values [B,G,N,D] of tokens at `position` [B,G,N] (-1: empty slot)."""

    @abstractmethod
    def decode(
        self, encoded: dict[str, torch.Tensor], position: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [B,G,N,D], given what `encode` returned and the same positions [B,G,N]."""

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
        """Attend query [B,G,Q,D] over all encoded tokens, `visible` [B,1|G,1|Q,N] or None; see `partial_attention`.

        On a CPU some units at a time, so that what is decoded stays in its caches. Raises BackendError where a kernel
        is forced for one new token: there is none.
        """

        from pikv_kernels.backends import refuse_forced
        from pikv_kernels.merge_partials import join_partials
        from pikv_kernels.partial_attention import partial_attention

        if visible is None or visible.shape[2] == 1:  # the query of one new token
            refuse_forced(f"codec '{self.name}'")
        N, unit = position.shape[2], self.unit_tokens
        at_once = max(1, CHUNK_TOKENS // unit) * unit if query.device.type == "cpu" and unit > 1 else N
        parts = []
        for start in range(0, N, at_once):
            tokens, units = slice(start, start + at_once), slice(start // unit, (start + at_once) // unit)
            chunk = {name: x[:, :, units] for name, x in encoded.items()}
            keys, values = self.decode(chunk, position[:, :, tokens], query.dtype)
            seen = None if visible is None else visible[..., tokens]
            parts.append(partial_attention(query, keys, values, seen, scale, softcap, with_probs))
        return join_partials(parts)

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
        """Attend query [B,G,Q,D] of one new token over pages [B,G,K] of `page_tokens` slots, read where they lie.

        A page of -1 is none, which codecs of one token a unit may be given. visible: bool [B,1|G,1,N] of all slots.
        None where they have to be copied before.
        """
        return None

    def for_layer(self, layer: int, fitted: Mapping[str, torch.Tensor], rotary: Any) -> Codec:
        """Return the codec of one layer, given what `fit` found for all of them (empty where not calibrated)."""
        return self

    def for_heads(self, head: torch.Tensor) -> Codec:
        """Return the codec for tokens [B,G,...] of the heads `head` [B,G], where it treats heads differently."""
        return self

    def fit(self, samples: Sequence[LayerSamples]) -> Fitted:
        """Learn from what each layer computed on calibration text."""
        raise NotImplementedError(f"codec '{self.name}' has nothing to fit")


def sees_alike(query: torch.Tensor, visible: torch.Tensor | None) -> bool:
    """Tell whether query [B,G,Q,D] may be one new token's heads, which see the same of a store."""
    return query.shape[2] <= MOST_GROUP and (visible is None or visible.shape[2] == 1)


def units_of_pages(pages: torch.Tensor, per_page: int) -> torch.Tensor:
    """Return the units [B,G,K·per_page] of pages [B,G,K] of `per_page` units each."""
    import torch

    return (pages[..., None] * per_page + torch.arange(per_page, device=pages.device)).flatten(2)
