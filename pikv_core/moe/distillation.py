"""Learning from a teacher (1503.02531): its softened predictions, and its hidden states (FitNets, 1412.6550).

Letters: N scored places, C classes, D hidden size of the student, D' of the teacher.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pikv_core.collectives import mean_count, num_ranks, total
from pikv_core.errors import UsageError
from pikv_core.moe.layer import MoE
from pikv_core.moe.router import at_least_float32
from pikv_core.moe.routing import Routing
from pikv_core.moe.shared import SharedExpert


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return temperature²·KL(teacher ‖ student) of the softened logits [N, C], a mean over N; 0 where they agree.

    The factor keeps the gradient's size as the temperature rises. The teacher gets no gradient.
    """
    if student.shape != teacher.shape:
        raise UsageError(
            f"the student's logits are {list(student.shape)} and the teacher's {list(teacher.shape)}",
            hint="both have to speak of the same tokens or classes",
        )
    wanted = (at_least_float32(teacher.detach()) / temperature).log_softmax(-1)
    given = (at_least_float32(student) / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(given, wanted, reduction="sum", log_target=True) / mean_count(len(student))


class HiddenMatch(nn.Module):
    """How far a student's hidden states are from a teacher's, through a learned projection where the sizes differ.

    It serves training alone and is no part of the student.
    """

    def __init__(self, hidden_size: int, teacher_hidden_size: int | None = None):
        super().__init__()
        teacher_hidden_size = hidden_size if teacher_hidden_size is None else teacher_hidden_size
        if teacher_hidden_size < 1:
            raise UsageError(f"teacher_hidden_size: expected a whole number of at least 1, got {teacher_hidden_size}")
        same = teacher_hidden_size == hidden_size
        self.projection = None if same else nn.Linear(hidden_size, teacher_hidden_size, bias=False)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return Σ‖teacher − projected student‖² / Σ‖teacher‖² over the real tokens of [..., D] and [..., D'].

        mask [...] is True for real tokens. The teacher gets no gradient.
        """
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
            if self.projection is not None:
                student = F.linear(student, self.projection.weight.to(student.dtype))
            weights = torch.ones_like(student[..., 0]) if mask is None else mask.to(student.dtype)
            error = ((student - teacher).square().sum(-1) * weights).sum()
            size = total((teacher.square().sum(-1) * weights).sum()) / num_ranks()
            return error / size.clamp(min=torch.finfo(teacher.dtype).tiny)


class DistilledMoE(MoE):
    """A mixture of experts that in training may be shown what a teacher's layer returned.

    In evaluation, and where it is shown nothing, it is the plain layer; `plain` returns that.
    """

    def __init__(
        self,
        gate: Any,
        experts: Any,
        shared_expert: SharedExpert | None,
        match: HiddenMatch | None,
        weight: float = 1.0,
    ):
        super().__init__(gate, experts, shared_expert)
        self.match = match
        self.weight = weight

    def forward(
        self, x: Tensor, mask: Tensor | None = None, teacher_hidden: Tensor | None = None, **info: Tensor
    ) -> tuple[Tensor, Routing]:
        """Return y like x [..., D], and the routing; in training, given teacher_hidden [..., D'], with its loss."""
        y, routing = super().forward(x, mask, **info)
        if self.training and teacher_hidden is not None:
            if self.match is None:
                raise UsageError("teacher_hidden: this layer has no teacher", hint="set use_distillation=True")
            loss = self.match(y, teacher_hidden, mask)
            routing = dataclasses.replace(
                routing,
                losses={**routing.losses, "distillation": loss},
                loss_weights={**routing.loss_weights, "distillation": self.weight},
            )
        return y, routing

    def plain(self) -> MoE:
        """Return the layer without what distillation needed; the weights are the same ones."""
        layer = MoE(self.gate, self.experts, self.shared_expert)
        return layer.train(self.training)
