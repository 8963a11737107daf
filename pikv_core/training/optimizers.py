"""The optimizers: Muon on the matrices inside the blocks, AdamW on everything else, or AdamW alone.

Muon after https://kellerjordan.github.io/posts/muon, its step scaled to that of AdamW (2502.16982), so that one
learning rate serves both. Stacked experts have a rate of their own: at AdamW's full rate they learn the answers'
frequencies before attention learns to look them up, and a small model stays there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pikv_core.schema import TrainSettings

BETAS = (0.9, 0.95)


class Optimizers:
    """One step, one learning rate and one state over all optimizers of a model."""

    def __init__(self, model: Any, settings: TrainSettings, beside: Iterable[Tensor] = ()):
        """Take the weights of a model that learn, and those of what learns beside it."""
        self._clip_norm = settings.clip_norm
        beside = list(beside)
        self._weights = [*(weight for weight in model.parameters() if weight.requires_grad), *beside]
        decay = settings.weight_decay
        ends = (getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output"))
        outside = {id(module.weight) for module in ends if module is not None}
        groups: dict[str, list[Tensor]] = {"muon": [], "experts": [], "decayed": beside, "plain": []}
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
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
        norm = torch.nn.utils.clip_grad_norm_(self._weights, self._clip_norm, foreach=True)
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_factor", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the states, to be saved."""
        return [optimizer.state_dict() for optimizer in self._all]

    def load_state_dict(self, states: Iterable[dict[str, Any]]) -> None:
        """Take over saved states."""
        for optimizer, state in zip(self._all, states, strict=True):
            optimizer.load_state_dict(state)


def _is_matrix_of_a_block(name: str) -> bool:
    """Return whether a matrix is inside a numbered block, and neither a router's nor an adapter's."""
    return re.search(r"\.\d+\.", name) is not None and not name.endswith("gate.weight") and "lora_" not in name
