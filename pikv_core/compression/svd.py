"""Low rank by the singular vectors of calibration keys and values, head by head (principal components, uncentred)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec, Fitted, LayerSamples
from pikv_core.compression.low_rank import CalibratedCodec, low_rank_of
from pikv_core.compression.none import Plain

if TYPE_CHECKING:
    import torch


@CODECS.register("svd")
@dataclass(frozen=True)
class SVD(CalibratedCodec):
    """Store r numbers for each key and value, r per layer.

    energy: share of the squared singular values that each head keeps of keys and of values. rank: in its place, the
    same for all layers. rope: whether keys are coded as before the rotary embedding (fewer numbers, rebuilt whenever
    they are read) or after it (attended to as they are stored); auto: what errs less at the same rank, by layer.
    """

    energy: Annotated[float, Field(gt=0, le=1)] = 0.95
    rank: Annotated[int, Field(ge=1)] | None = None
    rope: Literal["before", "after", "auto"] = "auto"

    def for_layer(self, layer: int, fitted: Mapping[str, torch.Tensor], rotary: Any) -> Codec:
        return low_rank_of(layer, fitted, rotary, Plain()) if fitted else self

    def fit(self, samples: Sequence[LayerSamples]) -> Fitted:
        """Fit every layer by itself; notes: its ranks and rope."""
        from pikv_core.compression.low_rank_fit import fit_svd, joined

        return joined(
            [fit_svd(sample, layer, self.rank, self.energy, self.rope) for layer, sample in enumerate(samples)]
        )
