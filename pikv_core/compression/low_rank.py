"""Low rank: a token is stored as its coordinates in a basis of its head, which calibration text has decided.

Shapes: B batch, G key/value heads, N tokens, Q query rows of a head's group, D head dim, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from pikv_core.compression.base import Codec, sees_alike
from pikv_core.compression.kivi import Kivi
from pikv_core.errors import PiKVError

if TYPE_CHECKING:
    import torch

    from pikv_kernels.attend_rebuilt import Rotation
    from pikv_kernels.partial_attention import Partial

CPU_TILE, DEVICE_TILE = 2**20, 2**26  # numbers of rebuilt keys at a time: what caches hold, what launches are worth


class Basis:
    """Take vectors x [B,G,N,D] to coordinates [B,G,N,r] and back: x ≈ (x · down) · upᵀ, computed in float32.

    down, up: [G,D,r]. heads [B,G]: which of them each row's heads are; None for all of them in order.
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor, heads: torch.Tensor | None = None):
        self._down, self._up, self._heads = down, up, heads

    def __deepcopy__(self, memo: dict[int, Any]) -> Basis:
        return self  # never written to: copies of a cache share it

    @property
    def rank(self) -> int:
        return self._down.shape[-1]

    @property
    def up(self) -> torch.Tensor:
        """What coordinates are multiplied by, [B|1,G,D,r] float32."""
        up = self._picked(self._up)
        return up if self._heads is not None else up[None]

    def of_heads(self, heads: torch.Tensor) -> Basis:
        """Return the basis for rows whose heads are `heads` [B,G], numbers of this basis's own."""
        return Basis(self._down, self._up, heads)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Return the coordinates [B,G,N,r] of x in its dtype."""
        self._move(x.device)
        return (x.float() @ self._picked(self._down)).to(x.dtype)

    def restore(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what coordinates [B,G,N,r] stand for, [B,G,N,D]."""
        self._move(codes.device)
        return (codes.float() @ self._picked(self._up).transpose(-1, -2)).to(dtype)

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Return float32 [B,G,Q,r] whose products with coordinates are those of `query` with what they stand for."""
        self._move(query.device)
        return query.float() @ self._picked(self._up)

    def _picked(self, matrices: torch.Tensor) -> torch.Tensor:
        return matrices if self._heads is None else matrices[self._heads]

    def _move(self, device: torch.device) -> None:
        if self._down.device != device:
            self._down, self._up = self._down.to(device), self._up.to(device)


@dataclass(frozen=True)
class LowRank(Codec):
    """Hold one layer's coordinates under another codec, by default as they are.

    rotary: the model's rotary embedding where keys are coded as they were before it; None where they are coded as
    attention uses them, so that queries are taken into the basis and keys are never rebuilt.
    """

    key: Basis
    value: Basis
    codes: Codec
    rotary: Any = None
    layer: int = 0

    @property
    def unit_tokens(self) -> int:
        return self.codes.unit_tokens

    @property
    def residual(self) -> int:
        return self.codes.residual

    def for_heads(self, head: torch.Tensor) -> LowRank:
        """Return the codec of rows whose heads are `head` [B,G], numbers of the layer's key/value heads."""
        return replace(self, key=self.key.of_heads(head), value=self.value.of_heads(head))

    def encode(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.rotary is not None:
            keys = self.rotary.unrotate(keys, _shared(position), self.layer)
        return self.codes.encode(self.key.project(keys), self.value.project(values), position)

    def decode(
        self, encoded: dict[str, torch.Tensor], position: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key_codes, value_codes = self.codes.decode(encoded, position, dtype)
        return self._keys(key_codes, position, dtype), self.value.restore(value_codes, dtype)

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
        if self.rotary is None:
            absorbed = self.key.absorb(query)
            part = self.codes.attend(absorbed, encoded, position, visible, scale, softcap, with_probs)
        else:
            part = self._attend_rebuilt(query, encoded, position, visible, scale, softcap, with_probs)
        return part._replace(output=self.value.restore(part.output, query.dtype))

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
        if self.rotary is not None:
            return None
        absorbed = self.key.absorb(query)
        part = self.codes.attend_pages(absorbed, encoded, pages, page_tokens, visible, scale, softcap)
        return None if part is None else part._replace(output=self.value.restore(part.output, query.dtype))

    def _attend_rebuilt(
        self,
        query: torch.Tensor,
        encoded: dict[str, torch.Tensor],
        position: torch.Tensor,
        visible: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        with_probs: bool,
    ) -> Partial:
        """Attend over keys that are rebuilt and rotated tile by tile; the output stays in the basis of values."""

        from pikv_kernels.attend_rebuilt import attend_rebuilt
        from pikv_kernels.backends import choose_for_newest
        from pikv_kernels.merge_partials import join_partials
        from pikv_kernels.partial_attention import partial_attention

        bits = self.codes.bits if isinstance(self.codes, Kivi) and 8 % self.codes.bits == 0 else None
        first = encoded.get("keys" if bits is None else "key_codes")
        if (
            first is not None
            and sees_alike(query, visible)
            and choose_for_newest("attend_rebuilt", query, first) == "numba"
            and self.rotary.pairs(self.layer) is not None
        ):
            rotation = self._rotation(position)
            return attend_rebuilt(query, encoded, bits, self.key.up, rotation, visible, scale, softcap, with_probs)
        key_codes, value_codes = self.codes.decode(encoded, position, query.dtype)
        parts = []
        tile_tokens = max(16, (CPU_TILE if query.is_cpu else DEVICE_TILE) // max(1, query[:, :, 0].numel()))
        for start in range(0, key_codes.shape[2], tile_tokens):
            tile = slice(start, start + tile_tokens)
            keys = self._keys(key_codes[:, :, tile], position[:, :, tile], query.dtype)
            seen = None if visible is None else visible[..., tile]
            parts.append(partial_attention(query, keys, value_codes[:, :, tile], seen, scale, softcap, with_probs))
        return join_partials(parts)

    def _rotation(self, position: torch.Tensor) -> Rotation:
        from pikv_kernels.attend_rebuilt import Rotation

        shared = _shared(position)
        turns = self.rotary.turns(self.layer, int(position.max()) + 1)
        return Rotation(self.rotary.pairs(self.layer), turns, shared[:, None] if shared.dim() == 2 else shared)

    def _keys(self, codes: torch.Tensor, position: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        keys = self.key.restore(codes, dtype)
        return keys if self.rotary is None else self.rotary.rotate(keys, _shared(position), self.layer)


def _shared(position: torch.Tensor) -> torch.Tensor:
    """Return positions [B,N] where all heads' [B,G,N] agree, which spares computing the same rotation for each."""
    first = position[:, 0]
    return first if bool((position == first[:, None]).all()) else position


class CalibratedCodec(Codec):
    """Stand for a codec whose layers each get one of their own from what calibration found.

    unfitted: options that what is found does not depend on.
    """

    calibrated: ClassVar[bool] = True
    unfitted: ClassVar[tuple[str, ...]] = ()

    @property
    def unit_tokens(self) -> int:
        return 1

    @property
    def residual(self) -> int:
        return 0

    def encode(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> dict[str, torch.Tensor]:
        self._refuse()

    def decode(
        self, encoded: dict[str, torch.Tensor], position: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise PiKVError(
            f"codec '{self.name}' runs only after calibration",
            hint=f"fit it to the model: pikv compress --calibrate --method {self.name} --model DIR --save DIR2",
        )


def low_rank_of(layer: int, fitted: Mapping[str, torch.Tensor], rotary: Any, codes: Codec) -> LowRank:
    """Return a layer's codec from the tensors that `LayerFit.tensors` names; raise PiKVError where rotary lacks."""
    name = f"layers.{layer}"
    unrotated = bool(fitted[f"{name}.unrotated"])
    if unrotated and rotary is None:
        raise PiKVError(
            "keys were calibrated as they are before the rotary embedding, which the cache does not know",
            hint="call cache.attach(model)",
        )
    bases = [Basis(fitted[f"{name}.{kind}.down"], fitted[f"{name}.{kind}.up"]) for kind in ("key", "value")]
    return LowRank(bases[0], bases[1], codes, rotary if unrotated else None, layer)
