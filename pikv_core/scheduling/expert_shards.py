"""Expert shards: older tokens lie in the shards of experts or key clusters, and a query reads those it needs most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pikv_core.errors import UsageError
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import ShardSelector

if TYPE_CHECKING:
    import torch


@POLICIES.register("expert-shards")
@dataclass(frozen=True)
class ExpertShards(ShardSelector):
    """Read the first `sinks` and the `newest` tokens, and of the others the shards that promise the most attention.

    A shard's promise is what its keys' count, mean and variance let expect of the sum of exp(logit), as a share of all
    shards', the mean over a group's heads, divided by latency^latency_weight where the shard is slow.

    by: what sends a token to its shard, clusters of "keys" (k-means of each head's, the nearest mean after that) or the
    layer's own "router". top_shards: most shards that are read; None for as many as the budget holds. slow_shards: the
    last so many are slow to read, `latency` times as slow as the others.
    """

    shards: Annotated[int, Field(ge=1)] = 8
    top_shards: Annotated[int, Field(ge=1)] | None = None
    by: Literal["keys", "router"] = "keys"
    sinks: Annotated[int, Field(ge=0)] = 4
    newest: Annotated[int, Field(ge=1)] = 64
    page_tokens: Annotated[int, Field(ge=8, multiple_of=8)] = 16
    dense_layers: Annotated[int, Field(ge=0)] = 0
    slow_shards: Annotated[int, Field(ge=0)] = 0
    latency: Annotated[float, Field(ge=1)] = 1.0
    latency_weight: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self) -> None:
        for name in ("top_shards", "slow_shards"):
            if (getattr(self, name) or 0) > self.shards:
                raise UsageError(
                    f"{name} {getattr(self, name)} of {self.shards} shards", hint="give no more than there are"
                )

    @property
    def limits_itself(self) -> bool:
        return self.top_shards is not None

    def num_pages(self, capacity: int, page_tokens: int) -> int:
        return max(1, capacity // page_tokens)

    def score(
        self, query: torch.Tensor, count: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, scale: float
    ) -> torch.Tensor:
        import torch

        rows = query.float() * scale
        logit = rows @ mean.mT + rows.square() @ variance.mT * 0.5 + count.log()[:, :, None]
        score = logit.log_softmax(dim=-1).logsumexp(dim=2) - math.log(rows.shape[2])
        if self.slow_shards and self.latency_weight:
            slow = torch.arange(self.shards, device=score.device) >= self.shards - self.slow_shards
            score = score - self.latency_weight * math.log(self.latency) * slow
        return score
