"""What a router returns, and the losses that keep it sound. E experts, K choices, T tokens, C slots.

Balance loss after Switch (2101.03961) and GShard (2006.16668), z-loss after ST-MoE (2202.08906).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pikv_core.collectives import mean_count, total


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts each token goes to; `dispatch, combine, probs, loss = routing` gives the dense form.

    weights: [T, K] float32, of each choice. experts: [T, K] int64. logits, probs: [T, E] float32. losses: by
    name, unweighted. loss_weights: the factor of each. expert_tokens: [E] int64, choices of real tokens per expert,
    those dropped over capacity too, those that chance skipped not. kept: bool [T, K], False for choices dropped or
    skipped and for padding, whose weight is 0; None where every choice is kept.
    """

    weights: Tensor
    experts: Tensor
    logits: Tensor
    probs: Tensor
    losses: dict[str, Tensor]
    loss_weights: dict[str, float]
    expert_tokens: Tensor
    kept: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.dispatch, self.combine, self.probs, self.loss)

    @property
    def weighted_losses(self) -> dict[str, Tensor]:
        """Return each loss times its weight, scalars."""
        return {name: self.loss_weights[name] * value for name, value in self.losses.items()}

    @property
    def loss(self) -> Tensor:
        """Return the weighted sum of the losses, a scalar."""
        return sum(self.weighted_losses.values(), self.logits.new_zeros(()))

    @cached_property
    def dispatch(self) -> Tensor:
        """Return [T, E, C] of bool: which slot of which expert holds a token; C is the largest load."""
        return self._dense(torch.ones_like(self.weights, dtype=torch.bool) if self.kept is None else self.kept)

    @cached_property
    def combine(self) -> Tensor:
        """Return [T, E, C]: the weight with which a token reads its slot."""
        return self._dense(self.weights)

    def _dense(self, values_TK: Tensor) -> Tensor:
        num_tokens, num_choices = self.experts.shape
        experts = self.experts.reshape(-1)
        chosen = torch.nn.functional.one_hot(experts, self.probs.shape[-1])
        kept = torch.ones_like(experts, dtype=torch.bool) if self.kept is None else self.kept.reshape(-1)
        chosen = chosen * kept[:, None]
        slots = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
        tokens = torch.arange(num_tokens, device=slots.device).repeat_interleave(num_choices)
        dense = values_TK.new_zeros(num_tokens, self.probs.shape[-1], max(1, int(chosen.sum(0).max())))
        return dense.index_put((tokens[kept], experts[kept], slots[kept]), values_TK.reshape(-1)[kept])


def count_tokens(experts: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Return [E] int64: the choices [T, K] that fell on each expert; mask [T] or [T, K] is True for those to count."""
    if mask is None:
        ones = torch.ones_like(experts)
    else:
        ones = (mask if mask.dim() == 2 else mask[:, None]).expand_as(experts).to(experts.dtype)
    return experts.new_zeros(num_experts).scatter_add_(0, experts.reshape(-1), ones.reshape(-1))


def balance_loss(probs: Tensor, expert_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return E/(N·K)·Σ_e c_e·P_e over the N real tokens, 1 when the load is balanced; c_e is that of all ranks."""
    counts = total(expert_tokens)
    shares = counts / counts.sum().clamp(min=1)
    return probs.shape[-1] * (shares * _mean_over_tokens(probs, mask)).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared log-sum-exp of the logits [T, E], (ln E)² where all logits are zero."""
    return _mean_over_tokens(logits.logsumexp(-1).square(), mask)


def load_spread(expert_tokens: Tensor) -> dict[str, float]:
    """Return max/mean and the coefficient of variation of a load [E]; 0 where there is none."""
    load = expert_tokens.double()
    mean = float(load.mean())
    return {
        "load_max_over_mean": float(load.max()) / mean if mean else 0.0,
        "load_cv": float(load.std(correction=0)) / mean if mean else 0.0,
    }


def entropy_sum(probs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | int]:
    """Return the entropies (nats) of the real tokens' probabilities [T, E], summed, and the number of those tokens."""
    entropy_T = torch.special.entr(probs).sum(-1)
    if mask is None:
        return entropy_T.sum(), len(entropy_T)
    return (entropy_T * mask.reshape(-1)).sum(), mask.sum()


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.sum(0) / mean_count(len(values))
    weights = mask.to(values.dtype)
    return torch.tensordot(weights, values, 1) / mean_count(weights.sum())
