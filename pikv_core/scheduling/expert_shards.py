"""Expert shards: older tokens lie in the shards of experts or key clusters, and a query reads the best of these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pikv_core.errors import UsageError
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import ShardKeys, ShardSelector

if TYPE_CHECKING:
    import torch


@POLICIES.register("expert-shards")
@dataclass(frozen=True)
class ExpertShards(ShardSelector):
    """Read the first `sinks` and the `newest` tokens, and of the others the shards that promise the largest logits.

    by: what sends a token to its shard, clusters of "keys" (k-means of each head's, the nearest mean after that) or the
    layer's own "router". promise: the "bounds" of a shard's keys, as Quest's of a page, the mean over a group's heads;
    or its "centroid", of which the attention it gets for each of its tokens is guessed. top_shards: most shards that
    are read; None for as many as the budget holds. slow_shards: the last so many are slow to read, `latency` times as
    slow as the others, and latency_weight·log(latency) goes off their score, which is in units of logits.
    """

    shards: Annotated[int, Field(ge=1)] = 8
    top_shards: Annotated[int, Field(ge=1)] | None = None
    by: Literal["keys", "router"] = "keys"
    promise: Literal["bounds", "centroid"] = "bounds"
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

    def score(self, query: torch.Tensor, shards: ShardKeys, scale: float) -> torch.Tensor:
        import torch

        from pikv_kernels.page_scores import page_scores

        R = query.shape[2]
        if self.promise == "bounds":
            score = page_scores(query, shards.lowest, shards.highest) * (scale / R)
        else:
            logit = query.float() @ shards.mean.mT * scale + shards.count.log()[:, :, None]
            score = logit.log_softmax(dim=-1).logsumexp(dim=2) - math.log(R)
        if self.slow_shards and self.latency_weight:
            slow = torch.arange(self.shards, device=score.device) >= self.shards - self.slow_shards
            score = score - self.latency_weight * math.log(self.latency) * slow
        return score
