"""What the codecs `lora`, `lora-int8` and `lora-int4` share: bases that are trained on calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pikv_core.compression.base import Codec, Fitted, LayerSamples
from pikv_core.compression.low_rank import CalibratedCodec, low_rank_of
from pikv_core.compression.none import Plain

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainedLowRank(CalibratedCodec):
    """Store `rank` numbers for each key and value, in bases that move attention's output least.

    rank: by default half the channels of a head (64 of 128). rope: as of `svd`. alpha, dropout: LoRA's, while
    training. steps, lr: of Adam; a quarter of the samples is held out, and what is best there is kept.
    """

    rank: Annotated[int, Field(ge=1)] | None = None
    rope: Literal["before", "after", "auto"] = "auto"
    alpha: Annotated[float, Field(gt=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    steps: Annotated[int, Field(ge=1)] = 200
    lr: Annotated[float, Field(gt=0)] = 0.03

    def codes(self) -> Codec:
        """Return the codec of the numbers themselves."""
        return Plain()

    @property
    def unit_tokens(self) -> int:
        return self.codes().unit_tokens

    @property
    def residual(self) -> int:
        return self.codes().residual

    def for_layer(self, layer: int, fitted: Mapping[str, torch.Tensor], rotary: Any) -> Codec:
        return low_rank_of(layer, fitted, rotary, self.codes()) if fitted else self

    def fit(self, samples: Sequence[LayerSamples]) -> Fitted:
        """Train every layer by itself; notes: its rank and rope, and the errors on held-out samples."""
        from pikv_core.compression.low_rank_fit import joined
        from pikv_core.compression.low_rank_train import Course, fit_lora

        course = Course(self.alpha, self.dropout, self.steps, self.lr)
        return joined(
            [
                fit_lora(sample, layer, self.rank or sample.keys.shape[-1] // 2, self.rope, course)
                for layer, sample in enumerate(samples)
            ]
        )
