"""PiKVCompressor: several methods, of which the best for what it is given compresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pikv_core.classic.compressors import (
    Compressor,
    FastVCompressor,
    LoRACompressor,
    PyramidCompressor,
    QuantizedCompressor,
    SVDCompressor,
)
from pikv_core.compression import CODECS
from pikv_core.errors import UsageError, closest

METHODS: dict[str, type[Compressor]] = {
    "lora": LoRACompressor,
    "svd": SVDCompressor,
    "pyramid": PyramidCompressor,
    "fastv": FastVCompressor,
    "quantized": QuantizedCompressor,
}


class PiKVCompressor:
    """Compress by one of several methods: those of METHODS, each with its defaults, and every codec by its name.

    `compressor(keys, values, importance)`: see `Compressor`. importance_threshold: tokens whose importance [B,S]
    reaches it in any row of the batch stay as they are, the others go through the method; without importance all do.
    adaptive_selection: each call tries all methods, and takes the one with the least error (mean of the relative errors
    of keys and values) among those within `max_ratio` of the bytes, the smallest where none is; else the first method
    is taken. Without importance "fastv" is left out. Raises UsageError for an unknown method, and where one of them
    has to be calibrated and is not.
    """

    def __init__(
        self,
        hidden_size: int,
        compression_methods: Sequence[str] = ("lora", "pyramid", "fastv"),
        importance_threshold: float = 0.5,
        adaptive_selection: bool = True,
        max_ratio: float = 0.55,  # half, and some room for positions
    ):
        if not compression_methods:
            raise UsageError("no compression methods", hint=f"give some of: {', '.join(_names())}")
        self.importance_threshold = importance_threshold
        self.adaptive_selection = adaptive_selection
        self.max_ratio = max_ratio
        self.compressors = {name: _compressor(name, hidden_size) for name in compression_methods}
        self.chosen: Compressor | None = None
        self._candidates: dict[str, dict[str, Any]] = {}

    def calibrate(self, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None = None) -> None:
        """Fit every method that has to be fitted; see `Compressor.calibrate`."""
        for compressor in self.compressors.values():
            compressor.calibrate(keys, values, queries)

    def __call__(
        self, keys: torch.Tensor, values: torch.Tensor, importance: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        candidates = list(self.compressors.values())
        if self.adaptive_selection:
            candidates = [x for x in candidates if importance is not None or not x.needs_importance] or candidates
        else:
            candidates = candidates[:1]
        found = {}
        for compressor in candidates:
            found[compressor] = compressor.compress(keys, values, importance, self.importance_threshold)
        stats = {compressor: compressor.get_compression_stats() for compressor in candidates}
        self.chosen = min(candidates, key=lambda compressor: self._rank(stats[compressor]))
        self._candidates = {name: stats[x] for name, x in self.compressors.items() if x in stats}
        for compressor in self.compressors.values():
            if compressor is not self.chosen:
                compressor.held = None
        return found[self.chosen]

    def get_compression_stats(self) -> dict[str, Any]:
        """Return what the last call holds, see `Compressor.get_compression_stats`; candidates: all that it tried."""
        if self.chosen is None:
            raise UsageError("nothing has been compressed yet", hint="call the compressor first")
        method = next(name for name, x in self.compressors.items() if x is self.chosen)
        return {**self.chosen.get_compression_stats(), "method": method, "candidates": self._candidates}

    def _rank(self, stats: dict[str, Any]) -> tuple[bool, float]:
        is_over = stats["compression_ratio"] > self.max_ratio
        error = (stats["key_error"] + stats["value_error"]) / 2
        return is_over, stats["compression_ratio"] if is_over else error


def _names() -> list[str]:
    return sorted({*METHODS, *CODECS.names()})


def _compressor(name: str, hidden_size: int) -> Compressor:
    if name in METHODS:
        return METHODS[name](hidden_size)
    if name not in CODECS.names():
        raise UsageError(
            f"unknown compression method '{name}'{closest(name, _names())}", hint=f"it is one of: {', '.join(_names())}"
        )
    return Compressor(hidden_size, name)
