"""The losses and the load of a model's routers, in one normalisation for every architecture."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pikv_core.moe.layer import MoE
from pikv_core.moe.routing import balance_loss, count_tokens, z_loss
from pikv_core.schema import ModelRecipe


class Gates(Protocol):
    """The routers of one model."""

    def loss(self, outputs: Any) -> Tensor | float:
        """Return the weighted loss of the routers for the forward pass that gave `outputs`."""

    def end_step(self) -> None:
        """Let routers update what they learn without gradients, after an optimizer step."""

    def reset_load(self) -> None:
        """Forget the load counted so far."""

    def load(self) -> list[Tensor]:
        """Return each layer's tokens per expert [E] since the last reset; nothing where all is dense."""


class NoGates:
    """A dense model's."""

    def loss(self, outputs: Any) -> float:
        return 0.0

    def end_step(self) -> None:
        pass

    def reset_load(self) -> None:
        pass

    def load(self) -> list[Tensor]:
        return []


class OwnGates:
    """Our decoder's: its layers compute their losses and count their load themselves."""

    def __init__(self, model: nn.Module):
        self._layers = [module for module in model.modules() if isinstance(module, MoE)]

    def loss(self, outputs: Any) -> Tensor:
        return outputs.aux_loss

    def end_step(self) -> None:
        for layer in self._layers:
            layer.gate.end_step()

    def reset_load(self) -> None:
        for layer in self._layers:
            layer.reset_stats()

    def load(self) -> list[Tensor]:
        return [torch.tensor(layer.get_stats()["expert_tokens"]) for layer in self._layers]


class WatchedGates:
    """A transformers model's: what its gates are given is recorded, and routed again in float32.

    Releases differ in what they return as router logits; what goes into a gate is the same in all.
    """

    def __init__(self, model: nn.Module, recipe: ModelRecipe):
        self._recipe = recipe
        self._logits: list[Tensor] = []
        self._gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        for gate in self._gates:
            gate.register_forward_pre_hook(self._record)
        self.reset_load()

    def loss(self, outputs: Any) -> Tensor:
        logits, self._logits = self._logits, []
        assert len(logits) == len(self._gates)
        losses = []
        for layer, logits_TE in enumerate(logits):
            probs_TE = logits_TE.softmax(-1)
            chosen_TK = probs_TE.topk(self._recipe.top_k, dim=-1).indices
            counts = count_tokens(chosen_TK, probs_TE.shape[-1])
            self._load[layer] = self._load[layer] + counts
            losses.append(
                self._recipe.balance_loss * balance_loss(probs_TE, counts) + self._recipe.z_loss * z_loss(logits_TE)
            )
        return torch.stack(losses).mean()

    def end_step(self) -> None:
        pass

    def reset_load(self) -> None:
        zero = torch.zeros(self._recipe.num_experts, dtype=torch.int64)
        self._load = [zero.to(gate.weight.device) for gate in self._gates]

    def load(self) -> list[Tensor]:
        return self._load

    def _record(self, gate: Any, inputs: tuple[Tensor, ...]) -> None:
        x_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
        with torch.autocast(x_TD.device.type, enabled=False):
            self._logits.append(x_TD.float() @ gate.weight.float().T)


def gates_of(model: nn.Module, recipe: ModelRecipe) -> Gates:
    """Return the routers of a model built from `recipe`."""
    if recipe.arch == "llama":
        return NoGates()
    return OwnGates(model) if recipe.arch == "pikv" else WatchedGates(model, recipe)


def load_statistics(load: list[Tensor]) -> dict[str, float]:
    """Return the load of the least balanced layer: max/mean and coefficient of variation."""
    if not load:
        return {}
    loads = torch.stack(load).double()
    mean = loads.mean(1).clamp(min=1)
    return {
        "load_max_over_mean": float((loads.max(1).values / mean).max()),
        "load_cv": float((loads.std(1, correction=0) / mean).max()),
    }
