"""Cache- and latency-aware routing: experts whose keys and values hit, and that answer soon, are preferred. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pikv_core.collectives import total
from pikv_core.errors import UsageError
from pikv_core.moe.expert_cache import lru_hits
from pikv_core.moe.router import Router
from pikv_core.moe.routers import ROUTERS
from pikv_core.moe.routing import Routing, count_tokens


@ROUTERS.register("pikv")
class PiKVRouter(Router):
    """Choose by logits + η·hit_e − λ·log(latency_e); the weights are the softmax of the plain logits chosen.

    hit_weight is η, latency_weight is λ; with both 0 it is `base` to the bit. Hit rates and latencies are averages
    weighted by decay^age, age in observations of that expert; one never observed counts as the mean of the others,
    so that it is neither shunned nor sought. They are saved with the model and take no gradient.

    It measures the hits itself, and learns from them after each training step: those of a memory that holds
    cache_experts experts (by default half of them), the least recently used one making room, in each sequence of more
    than one token. Latencies are told to it, see `pikv_core.moe.latency`.
    """

    hits: Tensor
    accesses: Tensor
    latency_sum_s: Tensor
    latency_count: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        hit_weight: float = 1.0,
        latency_weight: float = 0.1,
        decay: float = 0.99,
        cache_experts: int | None = None,
        **options: Any,
    ):
        super().__init__(hidden_size, num_experts, top_k, **options)
        if not 0 <= decay <= 1:
            raise UsageError(f"decay: expected a number from 0 to 1, got {decay}")
        self.cache_experts = max(1, num_experts // 2) if cache_experts is None else cache_experts
        if not 1 <= self.cache_experts <= num_experts:
            raise UsageError(f"cache_experts: expected from 1 to the {num_experts} experts, got {cache_experts}")
        self.hit_weight = hit_weight
        self.latency_weight = latency_weight
        self.decay = decay
        for name in ("hits", "accesses", "latency_sum_s", "latency_count"):
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.float32))

        # Not buffers: data-parallel wrappers overwrite those with the first rank's before a forward.
        self._step: tuple[Tensor, Tensor] | None = None  # hits and accesses [E] since the last training step
        self._counted: tuple[Tensor, Tensor] | None = None  # and since the last reset

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route x [..., S, D], one sequence or several; mask [..., S] is True for real tokens."""
        routing = super().forward(x, mask)
        num_tokens = x.shape[-2]
        if num_tokens > 1:
            mask_BS = None if mask is None else mask.reshape(-1, num_tokens)
            experts_BSK = routing.experts.view(-1, num_tokens, self.top_k)
            hits_BSK = lru_hits(experts_BSK, self.num_experts, self.cache_experts, mask_BS)
            hits_E = count_tokens(routing.experts, self.num_experts, hits_BSK.view_as(routing.experts))
            accesses_E = count_tokens(routing.experts, self.num_experts, None if mask is None else mask.reshape(-1))
            self._counted = _plus(self._counted, hits_E, accesses_E)
            if self.training:
                self._step = _plus(self._step, hits_E, accesses_E)
        return routing

    @torch.no_grad()
    def end_step(self) -> None:
        """Take in the hits of all forwards since the last step, over all data-parallel ranks."""
        counts = torch.zeros(2, self.num_experts, dtype=torch.int64, device=self.hits.device)
        if self._step is not None:
            counts += torch.stack(self._step)
        self.observe_hits(*total(counts))  # asked by every rank, one without tokens too
        self._step = None

    def reset_stats(self) -> None:
        self._counted = None

    def observe_hits(self, expert_hits: Tensor | Sequence[float], expert_accesses: Tensor | Sequence[float]) -> None:
        """Take in how many cache accesses [E] each expert had, and how many of them were hits [E]."""
        hits_E, accesses_E = (
            self._per_expert("expert_hits", expert_hits),
            self._per_expert("expert_accesses", expert_accesses),
        )
        if not bool(((0 <= hits_E) & (hits_E <= accesses_E)).all()):
            raise UsageError("expert_hits: expected from 0 to expert_accesses hits of every expert")
        self._add(self.hits, hits_E, accesses_E > 0)
        self._add(self.accesses, accesses_E, accesses_E > 0)

    def observe_latency(self, latency_s: Tensor | Sequence[float]) -> None:
        """Take in how long each expert took [E], in seconds; NaN where it was not measured."""
        latency_E = self._per_expert("latency_s", latency_s)
        measured_E = ~latency_E.isnan()
        if not bool(((latency_E > 0) & latency_E.isfinite())[measured_E].all()):
            raise UsageError("latency_s: expected seconds above 0, or NaN where not measured")
        self._add(self.latency_sum_s, latency_E, measured_E)
        self._add(self.latency_count, torch.ones_like(latency_E), measured_E)

    def preference(self) -> Tensor:
        """Return η·hit_e − λ·log(latency_e) [E], float32."""
        hit_E = _or_mean(self.hits / self.accesses)
        return self.hit_weight * hit_E - self.latency_weight * _or_mean((self.latency_sum_s / self.latency_count).log())

    def choose(self, logits_TE: Tensor, probs_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.hit_weight == 0 and self.latency_weight == 0:
            return super().choose(logits_TE, probs_TE, mask_T)
        experts_TK = (logits_TE.detach() + self.preference()).topk(self.top_k, dim=-1).indices
        # The renormalised softmax, taken so that improbable experts chosen for their speed do not give 0/0.
        return logits_TE.gather(-1, experts_TK).softmax(-1), experts_TK

    @property
    def top_k_weights(self) -> str | None:
        """Say "renormalised" where no expert can be preferred."""
        no_preference = self.hit_weight == self.latency_weight == 0 or self.top_k == self.num_experts
        return "renormalised" if no_preference else None

    def get_stats(self) -> dict[str, Any]:
        counted = None if self._counted is None else total(torch.stack(self._counted)).sum(-1)
        measured = None if counted is None else float(counted[0] / counted[1].clamp(min=1))
        return {
            "expert_hit_rate": measured,
            "hit_rate": _or_none(self.hits / self.accesses),
            "latency_s": _or_none(self.latency_sum_s / self.latency_count),
        }

    def _add(self, sums_E: Tensor, values_E: Tensor, seen_E: Tensor) -> None:
        sums_E.copy_(torch.where(seen_E, self.decay * sums_E + values_E, sums_E))

    def _per_expert(self, name: str, values: Tensor | Sequence[float]) -> Tensor:
        values_E = torch.as_tensor(values, dtype=torch.float32, device=self.hits.device)
        if values_E.shape != (self.num_experts,):
            raise UsageError(
                f"{name}: expected one number for each of {self.num_experts} experts, got {list(values_E.shape)}"
            )
        return values_E


def _plus(sums: tuple[Tensor, Tensor] | None, hits_E: Tensor, accesses_E: Tensor) -> tuple[Tensor, Tensor]:
    return (hits_E, accesses_E) if sums is None else (sums[0] + hits_E, sums[1] + accesses_E)


def _or_mean(values_E: Tensor) -> Tensor:
    """Replace NaN, 0/0 of what was never observed, by the mean of the others, or by 0 where there is none."""
    return torch.where(values_E.isnan(), values_E.nanmean().nan_to_num(0.0), values_E)


def _or_none(values_E: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values_E.tolist()]
