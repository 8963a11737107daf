"""The optimizers: Muon on the matrices inside the blocks, AdamW on everything else, or AdamW alone.

Muon after https://kellerjordan.github.io/posts/muon, its step scaled to that of AdamW (2502.16982), so that one
learning rate serves both. Stacked experts have a rate of their own: at AdamW's full rate they learn the answers'
frequencies before attention learns to look them up, and a small model stays there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from pikv_core.schema import TrainSettings
from pikv_core.training.team import Team

BETAS = (0.9, 0.95)
BESIDE = "beside."  # before the names of what learns beside the model


class Optimizers:
    """One step, one learning rate and one state over all optimizers of a model."""

    def __init__(
        self, model: Any, settings: TrainSettings, beside: Mapping[str, Tensor] | None = None, team: Team | None = None
    ):
        """Take the weights of a model that learn, and those of what learns beside it, by name."""
        self._clip_norm = settings.clip_norm
        self._team = team or Team()
        self._beside = dict(beside or {})
        learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._weights = learning | {f"{BESIDE}{name}": weight for name, weight in self._beside.items()}
        decay = settings.weight_decay
        ends = (getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output"))
        outside = {id(module.weight) for module in ends if module is not None}
        groups: dict[str, list[Tensor]] = {
            "muon": [],
            "experts": [],
            "decayed": list(self._beside.values()),
            "plain": [],
        }
        for name, weight in learning.items():
            if weight.dim() < 2 or id(weight) in outside:
                groups["plain"].append(weight)
            elif settings.optimizer == "muon" and weight.dim() == 2 and _is_matrix_of_a_block(name):
                groups["muon"].append(weight)
            else:
                groups["experts" if weight.dim() == 3 and ".experts." in name else "decayed"].append(weight)
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [
                    {"params": groups["experts"], "weight_decay": decay, "lr_factor": settings.expert_lr},
                    {"params": groups["decayed"], "weight_decay": decay, "lr_factor": 1.0},
                    {"params": groups["plain"], "weight_decay": 0.0, "lr_factor": 1.0},
                ],
                lr=settings.lr,
                betas=BETAS,
                fused=True,
            )
        ]
        if groups["muon"]:
            self._all.append(
                torch.optim.Muon(groups["muon"], lr=settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, lr: float) -> float:
        """Clip the gradients, move the weights, forget the gradients; return their norm before."""
        self._team.average_gradients(self._beside.values())
        norm = self._team.gradient_norm(self._weights.values())
        clip_grads_with_norm_(self._weights.values(), self._clip_norm, norm, foreach=True)
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_factor", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return what is remembered of each weight, by its name; settings are the recipe's, and no part of it."""
        states = {weight: state for optimizer in self._all for weight, state in optimizer.state.items()}
        return {name: dict(states[weight]) for name, weight in self._weights.items() if weight in states}

    def load_state_dict(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what was remembered of each weight."""
        unknown = [name for name in states if name not in self._weights]
        if unknown:
            raise ValueError(f"{unknown[0]} does not learn here")
        names = {id(weight): name for name, weight in self._weights.items()}
        for optimizer in self._all:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    state = states.get(names[id(weight)], {})
                    _check_shapes(names[id(weight)], weight, state)
                    # Numbers of steps are counted on the CPU, but by fused optimizers.
                    fused = bool(group.get("fused"))
                    placed = {
                        key: value.to(weight.device) if value.dim() or fused else value for key, value in state.items()
                    }
                    if placed:
                        optimizer.state[weight] = placed


def _check_shapes(name: str, weight: Tensor, state: Mapping[str, Tensor]) -> None:
    for value in state.values():
        if value.dim() and value.shape != weight.shape:
            raise ValueError(f"{name} was of shape {list(value.shape)}, and is of {list(weight.shape)}")


def _is_matrix_of_a_block(name: str) -> bool:
    """Return whether a matrix is inside a numbered block, and neither a router's nor an adapter's."""
    return re.search(r"\.\d+\.", name) is not None and not name.endswith("gate.weight") and "lora_" not in name
