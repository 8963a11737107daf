"""Compressors of keys and values by one method: a codec, or FastV's rule of which tokens stay.

Shapes: B batch, G key/value heads, H query heads, S tokens, D head dim; hidden_size = G·D.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from pikv_core import recipes
from pikv_core.classic.held import Held
from pikv_core.classic.lone_layer import as_given, by_heads
from pikv_core.components import build
from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec, LayerSamples
from pikv_core.errors import UsageError
from pikv_core.schema import CacheRecipe


class Compressor:
    """Compress keys and values by a codec of the registry; options are the codec's.

    `compressor(keys, values, importance)` takes keys and values [B,S,hidden_size] (one head) or [B,G,S,D] and returns
    what decodes from live storage, which `held` is. importance [B,S]: larger = more. Codecs that encode units of tokens
    leave the newest ones, which fill none, as they are. Raises UsageError for other shapes and before a codec that has
    to be calibrated is.
    """

    needs_importance = False
    keep_ratio = 1.0

    def __init__(self, hidden_size: int, codec: str = "none", **options: Any):
        if codec in CODECS.names() and any(field.name == "residual" for field in dataclasses.fields(CODECS[codec])):
            options = {"residual": 0, **options}
        recipe = recipes.validate(CacheRecipe, {"codec": {"name": codec, **options}}, type(self).__name__)
        self.hidden_size = hidden_size
        self.method = codec
        self._asked: Codec = build(CODECS, recipe.codec)
        self._codec = None if self._asked.calibrated else self._asked
        self._fitted_to: tuple[int, int] | None = None
        self.held: Held | None = None
        self._stats: dict[str, Any] = {}

    def calibrate(self, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None = None) -> None:
        """Fit the codec to samples, shaped as in a call; a codec that needs no fitting stays as it is.

        queries: [B,S,hidden_size] or [B,H,S,D]; without them the keys stand for them.
        """
        if not self._asked.calibrated:
            return
        k, v = by_heads(keys, self.hidden_size, "keys"), by_heads(values, self.hidden_size, "values")
        q = k if queries is None else queries[:, None] if queries.dim() == 3 else queries
        place = torch.arange(k.shape[2], device=k.device)
        fitted = self._asked.fit([LayerSamples(q, k, v, place, k.shape[-1] ** -0.5, rotary=None)])
        self._codec = self._asked.for_layer(0, fitted.tensors, None)
        self._fitted_to = (k.shape[1], k.shape[3])

    def __call__(
        self, keys: torch.Tensor, values: torch.Tensor, importance: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.compress(keys, values, importance)

    def compress(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        importance: torch.Tensor | None = None,
        threshold: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what a call does; tokens whose importance reaches `threshold` in any row stay as they are."""
        k, v = by_heads(keys, self.hidden_size, "keys"), by_heads(values, self.hidden_size, "values")
        if importance is None and self.needs_importance:
            raise UsageError(
                f"method '{self.method}' goes by importance, and none is given",
                hint="give importance [rows, tokens], such as the attention of the last query",
            )
        weight = k.new_zeros(k.shape[0], k.shape[2]) if importance is None else importance
        if k.shape != v.shape or weight.shape != (k.shape[0], k.shape[2]):
            raise UsageError(
                f"keys are {list(keys.shape)}, values {list(values.shape)}, importance {list(weight.shape)}",
                hint="keys and values have one shape, and importance is [rows, tokens]",
            )
        is_exact = torch.zeros(k.shape[2], dtype=torch.bool, device=k.device)
        if importance is not None and threshold is not None:
            is_exact = (importance >= threshold).any(dim=0)
        self.held = Held.of(k, v, weight, is_exact, self._ready(k), self.keep_ratio)
        key_error, value_error = self.held.errors(k, v)
        self._stats = {"full_bytes": k.nbytes + v.nbytes, "num_tokens": k.shape[2]}
        self._stats |= {"key_error": key_error, "value_error": value_error}
        found = self.held.tokens()
        return as_given(found[0], keys.dim() == 4), as_given(found[1], values.dim() == 4)

    @property
    def positions(self) -> torch.Tensor:
        """Which tokens the last call left, [B,G,S]."""
        return self._last().tokens()[2]

    def get_compression_stats(self) -> dict[str, Any]:
        """Return what the last call holds: bytes of live storage and relative errors ‖held − given‖ / ‖given‖.

        compression_ratio: resident over full bytes, full ones being those of the given keys and values. Tokens that
        were dropped count as zeros in the errors. num_kept: tokens that are left, of num_tokens.
        """
        held = self._last()
        resident = held.resident_bytes
        ratio = resident / self._stats["full_bytes"]
        kept = {"num_kept": self.positions.shape[2]}
        return {"method": self.method, "compression_ratio": ratio, "resident_bytes": resident, **self._stats, **kept}

    def _last(self) -> Held:
        if self.held is None:
            raise UsageError("nothing has been compressed yet", hint="call the compressor first")
        return self.held

    def _ready(self, keys: torch.Tensor) -> Codec:
        if self._codec is None:
            raise UsageError(
                f"method '{self.method}' runs only after calibration",
                hint="call calibrate(keys, values) with samples of what it will compress",
            )
        if self._fitted_to not in (None, (keys.shape[1], keys.shape[3])):
            raise UsageError(
                f"method '{self.method}' was calibrated on (heads, channels) {self._fitted_to}, "
                f"not {(keys.shape[1], keys.shape[3])}",
                hint="calibrate and compress in the same shape",
            )
        return self._codec


class LoRACompressor(Compressor):
    """Store `rank` numbers a head for each key and value, in bases that `calibrate` trains (codec `lora`).

    rank: by default half the channels of a head. alpha, dropout: LoRA's, while training.
    """

    def __init__(self, hidden_size: int, rank: int | None = None, alpha: float = 1.0, dropout: float = 0.0):
        super().__init__(hidden_size, "lora", rank=rank, alpha=alpha, dropout=dropout)


class SVDCompressor(Compressor):
    """Store singular coordinates (codec `svd`): `rank` a head, or as many as keep `energy` of the squared values."""

    def __init__(self, hidden_size: int, rank: int | None = None, energy: float = 0.95):
        super().__init__(hidden_size, "svd", rank=rank, energy=energy)


class PyramidCompressor(Compressor):
    """Give tokens bits by importance (codec `levels`): each of `num_levels` has `decay_factor` of the bits before.

    compression_ratio: bytes over those of 16-bit numbers. Without importance all tokens count the same.
    """

    def __init__(
        self, hidden_size: int, compression_ratio: float = 0.5, num_levels: int = 3, decay_factor: float = 0.8
    ):
        options = {"compression_ratio": compression_ratio, "num_levels": num_levels, "decay": decay_factor}
        super().__init__(hidden_size, "levels", **options)


class QuantizedCompressor(Compressor):
    """Store codes of 8, 4 or 2 bits with scales (codecs `int8`, `int4`, `int2`); group: tokens of a unit."""

    def __init__(self, hidden_size: int, bits: int = 8, group: int = 64):
        super().__init__(hidden_size, f"int{bits}", group=group)


class FastVCompressor(Compressor):
    """Keep the share `keep_ratio` of tokens that has the most importance, as they are; drop the others."""

    needs_importance = True

    def __init__(self, hidden_size: int, keep_ratio: float = 0.5):
        if not 0 < keep_ratio <= 1:
            raise UsageError(f"keep_ratio is a share in (0, 1], got {keep_ratio}")
        super().__init__(hidden_size)
        self.method, self.keep_ratio = "fastv", keep_ratio
