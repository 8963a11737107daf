"""Expert parallelism: the ranks of a group share a layer's experts, and tokens travel to them and back.

Every rank has tokens of its own, and as many experts as any other, by their number: its home. Router `eplb` may place
experts elsewhere, hot ones twice: then the weights travel too, before each forward pass, and their gradients home.
Letters: T tokens of this rank, K choices of each, N = T·K, P rows that arrive here, E experts, S slots of all ranks (a
slot is a place that holds one expert), R ranks, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.func import functional_call

from pikv_core.errors import UsageError
from pikv_core.moe.distillation import DistilledMoE
from pikv_core.moe.experts import Experts, compute_dtype
from pikv_core.moe.layer import MoE
from pikv_core.moe.lora import LoRAExperts
from pikv_core.moe.routers.eplb import Placement, spread
from pikv_core.moe.routing import Routing


@dataclass(frozen=True, eq=False)
class _Sent:
    """Rows on their way: theirs [P, D], their slots here [P], and what brings them home."""

    rows: Tensor
    slots: Tensor
    weights_TK: Tensor
    order_N: Tensor
    num_out: list[int]
    num_in: list[int]
    dtype: torch.dtype


class ShardedExperts(nn.Module):
    """A rank's part of a layer's experts; its weights have the names of the whole, and their first dimension is cut.

    What experts have in common, such as the base of low-rank ones, every rank has. Every rank of the group has to call
    it as often as the others, one without tokens too.
    """

    def __init__(self, experts: Experts | LoRAExperts, group: ProcessGroup):
        """Take this rank's part of whole experts, which every rank has to give."""
        super().__init__()
        self.group = group
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        if experts.num_experts % self.num_ranks:
            raise UsageError(
                f"expert_ranks: {experts.num_experts} experts do not divide evenly by {self.num_ranks} ranks",
                hint="every rank has as many experts",
            )
        self.num_experts = experts.num_experts
        self._num_home = experts.num_experts // self.num_ranks
        self._whole = (experts,)  # in a tuple: it computes here, and is no part of this module's state
        mine = slice(self.rank * self._num_home, (self.rank + 1) * self._num_home)
        self.sharded = [name for name, weight in experts.named_parameters() if weight.dim() == 3]
        for name, weight in experts.named_parameters():
            kept = nn.Parameter(weight[mine].clone(), weight.requires_grad) if name in self.sharded else weight
            self.register_parameter(name, kept)
            setattr(experts, name, kept)
        self.slots = torch.arange(self.num_experts).view(self.num_ranks, self._num_home)  # experts, [R, S/R], sorted
        self._rows: Tensor | None = None

    @property
    def at_home(self) -> bool:
        """Whether every expert is where its weights are, and nowhere else."""
        return torch.equal(self.slots.flatten(), torch.arange(self.num_experts))

    def place(self, placement: Placement) -> None:
        """Have the experts where a plan wants them, from the next forward pass on."""
        if int(placement.ranks.max()) + 1 != self.num_ranks:
            raise UsageError(f"the plan is for {int(placement.ranks.max()) + 1} ranks, not {self.num_ranks}")
        held = [placement.experts[placement.ranks == rank].sort().values for rank in range(self.num_ranks)]
        self.slots = torch.stack(held)
        self._rows = None  # they were of other slots

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Return Σ_k weights[t, k]·expert[experts[t, k]](x[t]) for x [T, D]."""
        return self.receive(self.send(x, weights, experts))

    def send(self, x: Tensor, weights: Tensor, experts: Tensor) -> _Sent:
        """Start the tokens x [T, D] on their way to their experts [T, K]."""
        slots_S = self.slots.flatten().to(x.device)
        slots_N = (experts if self.at_home else spread(experts, slots_S)).reshape(-1)
        order_N = slots_N.argsort(stable=True)
        counts_S = torch.bincount(slots_N, minlength=len(slots_S))
        counts_RS = all_to_all_single(counts_S.view(self.num_ranks, -1), None, None, self.group)
        num_out = counts_S.view(self.num_ranks, -1).sum(-1).tolist()
        num_in = counts_RS.sum(-1).tolist()
        rows_ND = x.to(compute_dtype(x)).index_select(0, order_N // experts.shape[1])
        rows_PD = all_to_all_single_autograd(rows_ND, num_in, num_out, self.group)
        here = torch.arange(counts_RS.shape[1], device=x.device).repeat(self.num_ranks)
        slots_P = here.repeat_interleave(counts_RS.flatten())
        self._rows = counts_RS.sum(0) if self._rows is None else self._rows + counts_RS.sum(0)
        return _Sent(rows_PD, slots_P, weights, order_N, num_out, num_in, x.dtype)

    def receive(self, sent: _Sent) -> Tensor:
        """Return what the experts made of the tokens that `send` took."""
        ones_P1 = sent.weights_TK.new_ones(len(sent.slots), 1)
        weights = dict(self.named_parameters(recurse=False)) | {name: self._fetched(name) for name in self.sharded}
        experts = self._whole[0]
        experts.num_experts = self.slots.shape[1]
        out_PD = functional_call(experts, weights, (sent.rows, ones_P1, sent.slots[:, None]))
        out_ND = all_to_all_single_autograd(out_PD.contiguous(), sent.num_out, sent.num_in, self.group)
        back_N = torch.empty_like(sent.order_N)
        back_N[sent.order_N] = torch.arange(len(back_N), device=back_N.device)
        out_TKD = out_ND.index_select(0, back_N).unflatten(0, sent.weights_TK.shape)
        return (out_TKD * sent.weights_TK[..., None]).sum(1).to(sent.dtype)

    def whole(self) -> Experts | LoRAExperts:
        """Return the experts with the weights of all ranks, on every rank."""
        experts = self._whole[0]
        for name, weight in self.named_parameters(recurse=False):
            if name in self.sharded:
                parts = [torch.empty_like(weight) for _ in range(self.num_ranks)]
                dist.all_gather(parts, weight.detach().contiguous(), group=self.group)
                weight = nn.Parameter(torch.cat(parts), weight.requires_grad)
            setattr(experts, name, weight)
        experts.num_experts = self.num_experts
        return experts

    def reset_stats(self) -> None:
        """Forget the rows counted so far."""
        self._rows = None

    def get_stats(self) -> dict[str, Any]:
        """Return the rows that every slot of every rank had, [R, S/R], over all groups; and the bytes here."""
        rows_RS = torch.zeros(self.slots.shape, dtype=torch.int64)
        if self._rows is not None:
            rows_RS[self.rank] = self._rows.cpu()
        dist.all_reduce(rows_RS)
        return {
            "rank_tokens": rows_RS.tolist(),
            "rank_load_max_over_mean": float(rows_RS.sum(-1).max() / rows_RS.sum(-1).double().mean().clamp(min=1)),
            "expert_bytes": sum(weight.nbytes for weight in self.parameters()),
        }

    def _fetched(self, name: str) -> Tensor:
        """Return a weight's part [S/R, ...] for the slots of this rank, from where it is at home."""
        weight = getattr(self, name)
        if self.at_home:
            return weight
        home_RS = self.slots // self._num_home  # the slots of a rank are sorted, so grouped by home
        mine = (home_RS == self.rank).to(weight.device)
        leaving = self.slots.to(weight.device)[mine] - self.rank * self._num_home
        num_out = mine.sum(-1).tolist()
        num_in = torch.bincount(home_RS[self.rank], minlength=self.num_ranks).tolist()
        rows = weight.index_select(0, leaving).flatten(1)
        return all_to_all_single_autograd(rows, num_in, num_out, self.group).view(-1, *weight.shape[1:])


class DistributedPiKVMoE(DistilledMoE):
    """A mixture of experts whose experts are shared out over a group of ranks; the router every rank has.

    While tokens travel, the shared expert computes. Outputs and gradients are those of the whole layer.
    """

    def __init__(self, layer: MoE, group: ProcessGroup | None = None):
        """Take over a layer that every rank of the group (by default all) built alike; call it before an optimizer."""
        group = dist.group.WORLD if group is None else group
        assert group is not None
        match = layer.match if isinstance(layer, DistilledMoE) else None
        super().__init__(layer.gate, ShardedExperts(layer.experts, group), layer.shared_expert, match)
        self.train(layer.training)

    def combine(self, x: Tensor, routing: Routing) -> Tensor:
        sent = self.experts.send(x.reshape(-1, x.shape[-1]), routing.weights, routing.experts)
        shared = None if self.shared_expert is None else self.shared_expert(x)
        y = self.experts.receive(sent).view_as(x)
        return y if shared is None else y + shared

    def reset_stats(self) -> None:
        super().reset_stats()
        self.experts.reset_stats()

    def whole(self) -> MoE:
        """Return the layer with all experts, on every rank."""
        layer = MoE(self.gate, self.experts.whole(), self.shared_expert)
        return layer.train(self.training)
