"""Expected attention: what keys would get from queries distributed as the prompt's were (arXiv 2510.00636).

Shapes: B batch, H query heads, G key/value heads, R = H/G, T tokens, S stored tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.observation import LayerRun
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch

COUNT, MEAN, SCATTER = (f"expected-attention/{name}" for name in ("count", "mean", "scatter"))


@POLICIES.register("expected-attention")
@dataclass(frozen=True)
class ExpectedAttention(Evictor):
    """Keep the first `sinks` tokens and those with the largest expected attention times the length of their value.

    Un-rotated prompt queries, those of the first `sinks` tokens left out, give a mean m and a covariance C for each
    query head; both are turned by the mean rotation of the next `future` positions. A key's expected logit is
    m·k/√D + k·C·k/2D; the softmax over all keys but the sinks', the mean over a group's heads, plus `epsilon`, times
    the norm of the value is its score.
    """

    decides_once: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    sees_queries: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("keys", "values", "rotary")
    sinks: Annotated[int, Field(ge=0)] = 4
    future: Annotated[int, Field(ge=1)] = 512
    epsilon: Annotated[float, Field(ge=0)] = 1e-2

    def observe_queries(self, query: torch.Tensor, position: torch.Tensor, layer: LayerRun) -> None:
        """Merge the queries' number [B], mean [B,H,D] and centred scatter [B,H,D,D] into the layer's."""
        query = layer.rotary_for(self.name).unrotate(query, position, layer.index).float()
        counted = position >= self.sinks
        count = counted.sum(dim=1).float()
        share = (counted / count.clamp(min=1)[:, None])[:, None, :, None]
        mean = (query * share).sum(dim=2)
        centred = (query - mean[:, :, None]) * counted[:, None, :, None]
        scatter = centred.transpose(2, 3) @ centred
        if COUNT in layer.own:
            seen = layer.own[COUNT]
            total = (seen + count).clamp(min=1)
            apart = mean - layer.own[MEAN]
            scatter += layer.own[SCATTER]
            scatter += (seen * count / total)[:, None, None, None] * apart[..., None] * apart[..., None, :]
            mean = layer.own[MEAN] + (count / total)[:, None, None] * apart
            count = seen + count
        layer.own.update({COUNT: count, MEAN: mean, SCATTER: scatter})

    def score(self, tokens: Tokens) -> torch.Tensor:
        import torch

        if COUNT not in tokens.layer.own:
            return tokens.position.float()
        mean, covariance = self._expected_queries(tokens)
        keys = tokens.keys().float()
        D = keys.shape[-1]
        is_sink = tokens.position < self.sinks
        expected = torch.zeros_like(keys[..., 0])
        num_queries = mean.shape[2]
        for head in range(num_queries):
            logits = (keys @ mean[:, :, head, :, None])[..., 0] / D**0.5
            logits += ((keys @ covariance[:, :, head]) * keys).sum(dim=-1) / (2 * D)
            expected += torch.softmax(logits.masked_fill(is_sink, -torch.inf), dim=-1).nan_to_num(0.0) / num_queries
        score = (expected + self.epsilon) * tokens.values().float().norm(dim=-1)
        return score.masked_fill(is_sink, torch.inf)

    def _expected_queries(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean [B,G,R,D] and covariance [B,G,R,D,D] of the queries of the next `future` positions."""
        import torch

        layer = tokens.layer
        count, mean, scatter = (layer.own[name] for name in (COUNT, MEAN, SCATTER))
        B, H, D = mean.shape
        by_group = (B, layer.num_kv_heads, H // layer.num_kv_heads)
        pair = tokens.row[:, None], tokens.head
        covariance = scatter / count.clamp(min=1)[:, None, None, None]
        mean, covariance = mean.view(*by_group, D)[pair], covariance.view(*by_group, D, D)[pair]
        identity = torch.eye(D, device=mean.device)[None, :, None].expand(-1, -1, self.future, -1)
        turn = layer.rotary.rotate(identity, torch.arange(self.future, device=mean.device), layer.index).mean(dim=2)
        turn = turn.expand(len(mean), 1, -1, -1)
        turn = layer.rotary.shift(turn, tokens.num_seen[:, None].expand(-1, D), layer.index)
        return mean @ turn, turn.mT[:, None] @ covariance @ turn[:, None]
