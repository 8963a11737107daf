"""Fit bases to what a layer computed on calibration text: the leading singular vectors of each head.

Shapes: B windows, G key/value heads, N tokens, D head dim, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pikv_core.compression.base import Fitted, LayerSamples
from pikv_core.compression.low_rank import Basis, LowRank
from pikv_core.compression.measured import measure
from pikv_core.compression.none import Plain
from pikv_core.errors import PiKVError

Rope = Literal["before", "after", "auto"]


@dataclass(frozen=True)
class LayerFit:
    """One layer's bases, each down and up [G,D,r] float32, and what the manifest says of them."""

    key: tuple[torch.Tensor, torch.Tensor]
    value: tuple[torch.Tensor, torch.Tensor]
    unrotated: bool
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def all_notes(self) -> dict[str, Any]:
        """The notes with ranks and rope."""
        ranks = {"key_rank": self.key[0].shape[-1], "value_rank": self.value[0].shape[-1]}
        return {"rope": "before" if self.unrotated else "after", **ranks, **self.notes}

    def codec(self, layer: int, rotary: Any) -> LowRank:
        """Return the codec that holds the coordinates as they are."""
        return LowRank(Basis(*self.key), Basis(*self.value), Plain(), rotary if self.unrotated else None, layer)

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """Return the tensors by the names under which `low_rank_of` finds them."""
        name = f"layers.{layer}"
        found = {f"{name}.unrotated": torch.tensor(self.unrotated)}
        for kind, (down, up) in (("key", self.key), ("value", self.value)):
            found |= {f"{name}.{kind}.down": down.clone(), f"{name}.{kind}.up": up.clone()}
        return {key: x.contiguous().cpu() for key, x in found.items()}


def joined(fits: list[LayerFit]) -> Fitted:
    """Return all layers' bases as one calibration."""
    tensors = {name: x for layer, fit in enumerate(fits) for name, x in fit.tensors(layer).items()}
    return Fitted(tensors, {"layers": [fit.all_notes for fit in fits]})


def singular(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the right singular vectors [G,D,D] of each head's x [B,G,N,D], largest first, and their squared values."""
    rows = x.transpose(0, 1).flatten(1, 2).double()
    squares, vectors = torch.linalg.eigh(rows.transpose(-1, -2) @ rows)
    return vectors.flip(-1).float(), squares.flip(-1).clamp(min=0)


def rank_of(squares: torch.Tensor, energy: float) -> int:
    """Return the smallest rank that keeps `energy` of the squared singular values [G,D] in every head."""
    kept = squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(squares.dtype).tiny)
    short = kept < min(energy, 1 - 1e-12)
    return min(squares.shape[-1], int(short.sum(-1).max()) + 1)


def fit_svd(samples: LayerSamples, layer: int, rank: int | None, energy: float, rope: Rope) -> LayerFit:
    """Fit one layer; `rank` goes before `energy`. With rope "auto" the better of both at an equal rank."""
    D = samples.keys.shape[-1]
    if rank is not None and rank > D:
        raise PiKVError(f"rank {rank} is more than the {D} channels of a head", hint=f"give a rank below {D}")
    vectors, squares = singular(samples.values)
    value = vectors[..., : rank or rank_of(squares, energy)]
    found: dict[bool, torch.Tensor] = {}
    notes = {}
    for unrotated in (False, True):
        if rope != "auto" and unrotated != (rope == "before"):
            continue
        try:
            vectors, squares = singular(_keys(samples, layer, unrotated))
        except PiKVError as error:
            if rope == "before":
                raise
            notes["rope_before"] = f"not possible: {error.message}"
            continue
        found[unrotated] = vectors[..., : rank or rank_of(squares, energy)]
    least = min(key.shape[-1] for key in found.values())

    def error_of(unrotated: bool) -> float:
        key = found[unrotated][..., :least]
        codec = LayerFit((key, key), (value, value), unrotated).codec(layer, samples.rotary)
        return measure(codec, samples).output_error

    chosen = min(found, key=error_of) if len(found) > 1 else next(iter(found))
    return LayerFit((found[chosen], found[chosen]), (value, value), chosen, notes)


def _keys(samples: LayerSamples, layer: int, unrotated: bool) -> torch.Tensor:
    if not unrotated:
        return samples.keys
    if samples.rotary is None:
        raise PiKVError("rope 'before': the model has no rotary embedding", hint="choose rope 'after' or 'auto'")
    return samples.rotary.unrotate(samples.keys, samples.position, layer)
