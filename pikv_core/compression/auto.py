"""A codec for each layer, chosen so that attention's output errs least under a byte budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from pikv_core.components import Component, NameIn, build
from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec, Fitted, LayerSamples
from pikv_core.compression.low_rank import CalibratedCodec
from pikv_core.errors import PiKVError, UsageError

if TYPE_CHECKING:
    import torch

CodecName = Annotated[str, NameIn("pikv_core.compression:CODECS")]


@CODECS.register("auto")
@dataclass(frozen=True)
class Auto(CalibratedCodec):
    """Spread a byte budget over the layers by measured error.

    bytes_share: bytes of an encoded token over those of a full one, positions counted. candidates: codecs to choose
    from, each with its own defaults.
    """

    listed: ClassVar[str] = "candidates"  # what `auto:int8+svd` names
    bytes_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    candidates: Annotated[tuple[CodecName, ...], Field(min_length=1)] = ("none", "int8", "fp8", "int4", "int2", "svd")

    def for_layer(self, layer: int, fitted: Mapping[str, torch.Tensor], rotary: Any) -> Codec:
        if not fitted:
            return self
        mark = f"choice.{layer}."
        name = next(key.removeprefix(mark) for key in fitted if key.startswith(mark))
        return _codec(name).for_layer(layer, _strip(fitted, f"{name}/"), rotary)

    def fit(self, samples: Sequence[LayerSamples]) -> Fitted:
        """Measure every candidate on every layer, and choose; notes: what was measured, the choice, its bytes."""
        import torch

        from pikv_core.compression.knapsack import choose
        from pikv_core.compression.measured import measure, whole_units

        self._check()
        codecs = [_codec(name) for name in self.candidates]
        unit_tokens = math.lcm(*(codec.unit_tokens for codec in codecs))
        samples = [whole_units(sample, unit_tokens) for sample in samples]  # the same tokens for every candidate
        fits = [codec.fit(samples) if codec.calibrated else Fitted({}) for codec in codecs]
        measured = [
            [measure(codec.for_layer(i, fit.tensors, sample.rotary), sample) for codec, fit in zip(codecs, fits)]
            for i, sample in enumerate(samples)
        ]
        full_bytes = sum(layer[0].full_bytes for layer in measured)
        costs = [[candidate.num_bytes for candidate in layer] for layer in measured]
        errors = [[candidate.output_error for candidate in layer] for layer in measured]
        chosen = choose(errors, costs, int(self.bytes_share * full_bytes))
        if chosen is None:
            least = sum(map(min, costs)) / full_bytes
            raise PiKVError(
                f"codec 'auto': bytes_share {self.bytes_share} is below the {least:.4f} of the smallest candidates",
                hint="raise bytes_share, or add smaller candidates",
            )
        tensors: dict[str, torch.Tensor] = {}
        layers = []
        for i, pick in enumerate(chosen):
            name = self.candidates[pick]
            tensors[f"choice.{i}.{name}"] = torch.tensor(errors[i][pick])
            tensors |= {f"{name}/{key}": x for key, x in fits[pick].tensors.items() if key.startswith(f"layers.{i}.")}
            layers.append(
                {
                    "codec": name,
                    "output_errors": dict(zip(self.candidates, errors[i])),
                    "bytes_shares": {other: x.bytes_share for other, x in zip(self.candidates, measured[i])},
                }
            )
        total = sum(costs[i][pick] for i, pick in enumerate(chosen))
        return Fitted(tensors, {"bytes_share": total / full_bytes, "layers": layers})

    def _check(self) -> None:
        for name in self.candidates:
            if CODECS[name].sorted_by is not None or name == self.name:
                raise UsageError(
                    f"codec 'auto' cannot choose '{name}'",
                    hint="a candidate is a codec whose error calibration text alone tells, such as int4 or svd",
                )


def _codec(name: str) -> Codec:
    return build(CODECS, Component(name))


def _strip(fitted: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): x for key, x in fitted.items() if key.startswith(prefix)}
