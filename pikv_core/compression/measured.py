"""What a codec costs and loses on calibration text: bytes, and how far keys, values and attention's outputs move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pikv_core.errors import PiKVError

if TYPE_CHECKING:
    import torch

    from pikv_core.compression.base import Codec, LayerSamples

POSITION_BYTES = 4  # that the cache keeps with a token of each head, whatever the codec


@dataclass(frozen=True)
class Measured:
    """Errors are ‖found − exact‖ / ‖exact‖ over all windows, heads and tokens; bytes are of all of these tokens."""

    key_error: float
    value_error: float
    output_error: float
    num_bytes: int
    full_bytes: int

    @property
    def bytes_share(self) -> float:
        return self.num_bytes / self.full_bytes


def measure(codec: Codec, samples: LayerSamples) -> Measured:
    """Encode and decode the samples, whole units of them, and attend to both."""
    samples = whole_units(samples, codec.unit_tokens)
    position = samples.position.expand(samples.keys.shape[:3])
    encoded = codec.encode(samples.keys, samples.values, position)
    keys, values = codec.decode(encoded, position, samples.keys.dtype)
    exact = outputs(samples, samples.keys, samples.values)
    return Measured(
        key_error=relative_error(keys, samples.keys),
        value_error=relative_error(values, samples.values),
        output_error=relative_error(outputs(samples, keys, values), exact),
        num_bytes=sum(x.nbytes for x in encoded.values()) + POSITION_BYTES * position.numel(),
        full_bytes=samples.keys.nbytes + samples.values.nbytes,
    )


def outputs(samples: LayerSamples, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the causal attention outputs [B,H,N,D], float32, of the samples' queries over these keys and values."""
    from pikv_kernels.partial_attention import causal_attention

    return causal_attention(samples.queries.float(), keys.float(), values.float(), samples.scale)


def whole_units(samples: LayerSamples, unit_tokens: int) -> LayerSamples:
    """Return the samples without the newest tokens, which fill no unit; raise PiKVError where that leaves none."""
    num_tokens = samples.keys.shape[2] // unit_tokens * unit_tokens
    if num_tokens == 0:
        raise PiKVError(
            f"a unit is {unit_tokens} tokens, the calibration windows hold {samples.keys.shape[2]}",
            hint="raise context_tokens",
        )
    queries, keys, values = (x[:, :, :num_tokens] for x in (samples.queries, samples.keys, samples.values))
    return replace(samples, queries=queries, keys=keys, values=values, position=samples.position[:num_tokens])


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return ‖found − exact‖ / ‖exact‖, 0 where all is zero."""
    size = exact.float().norm().item()
    return (found.float() - exact.float()).norm().item() / size if size else 0.0
