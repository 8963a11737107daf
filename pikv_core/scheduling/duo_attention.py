"""DuoAttention: some heads keep everything, the others their first and newest tokens (arXiv 2410.10819).

Shapes: B batch, L layers, G key/value heads of a layer, S stored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.errors import PiKVError
from pikv_core.observation import LayerRun
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch


@POLICIES.register("duo-attention")
@dataclass(frozen=True)
class DuoAttention(Evictor):
    """Let the heads with the smallest gates stream, as few as the budget allows; the others keep everything.

    A streaming head keeps the first `sinks` tokens and the newest `recent`, and a share of what the budget leaves over
    as more of the newest. Where the budget is too small even with all heads streaming, both shrink in proportion. The
    gates [L,G] in 0..1 are learnt (`LayerRun.fitted`).

    streaming_prefill: a prompt's queries see no more in a streaming head than what it keeps after the prompt, each its
    own newest tokens. This is what the paper deploys; it saves time, T·(sinks + recent) instead of T²/2, and changes
    the prompt's output. Without it prompts attend to everything and are dropped from afterwards.
    """

    calibrated: ClassVar[bool] = True
    fitted_by: ClassVar[str] = "duo-gates"
    sinks: Annotated[int, Field(ge=0)] = 64
    recent: Annotated[int, Field(ge=1)] = 256
    streaming_prefill: bool = False

    def score(self, tokens: Tokens) -> torch.Tensor:
        num_sinks = self._num_sinks(tokens.capacity)
        is_sink = tokens.position < num_sinks[..., None]
        return tokens.position.float().masked_fill(is_sink, float("inf"))

    def capacity(self, mean: torch.Tensor, num_seen: torch.Tensor, layer: LayerRun) -> torch.Tensor:
        """Return tokens per head [B,G] of this layer; over all layers they are `mean` [B] a head to the token."""
        import torch

        gates = self._gates(layer)
        num_heads = gates.numel()
        rank = gates.flatten().argsort(stable=True).argsort().to(mean.device)
        seen, total = num_seen, torch.minimum(mean, num_seen) * num_heads
        window = seen.clamp(max=self.sinks + self.recent)
        freed_by_one = (seen - window).clamp(min=1)
        num_streaming = -(-(num_heads * seen - total) // freed_by_one)
        num_streaming = num_streaming.where(total >= num_heads * window, num_heads)
        left = total - (num_heads - num_streaming) * seen
        share, rest = left // num_streaming.clamp(min=1), left % num_streaming.clamp(min=1)
        streams = rank < num_streaming[:, None]
        streaming = share[:, None] + (rank < rest[:, None])
        by_head = streaming.where(streams, seen[:, None])
        return by_head.view(len(mean), *gates.shape)[:, layer.index]

    def prompt_reach(self, capacity: torch.Tensor, layer: LayerRun) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.streaming_prefill:
            return None
        num_sinks = self._num_sinks(capacity)
        return num_sinks, capacity - num_sinks

    def _num_sinks(self, capacity: torch.Tensor) -> torch.Tensor:
        in_proportion = capacity * self.sinks // (self.sinks + self.recent)
        return in_proportion.clamp(max=self.sinks)

    def _gates(self, layer: LayerRun) -> torch.Tensor:
        gates = layer.fitted["gates"]
        expected = (layer.num_layers, layer.num_kv_heads)
        if tuple(gates.shape) != expected:
            raise PiKVError(
                f"policy '{self.name}' has gates for {tuple(gates.shape)} layers and heads, the model has {expected}",
                hint="give the calibration that was made for this model",
            )
        return gates
