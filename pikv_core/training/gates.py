"""The losses and the load of a model's routers, in one normalisation for every architecture."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pikv_core.collectives import total
from pikv_core.moe.layer import MoE
from pikv_core.moe.routing import balance_loss, count_tokens, entropy_sum, load_spread, z_loss

LayerStatistics = dict[str, Any]


class Gates(Protocol):
    """The routers of one model."""

    def losses(self, outputs: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return the weighted losses of the routers for the forward pass that gave `outputs`, means over layers.

        mask [B, T] is True for real tokens; None for all.
        """

    def end_step(self) -> None:
        """Let routers update what they learn without gradients, after an optimizer step."""

    def reset(self) -> None:
        """Forget what was counted so far."""

    def statistics(self) -> list[LayerStatistics]:
        """Return what each layer counted since the last reset; nothing where all is dense.

        expert_tokens [E], load_max_over_mean, load_cv, router_entropy (nats), dropped_tokens, and what the kind of
        router has to tell.
        """


class NoGates:
    """A dense model's."""

    def losses(self, outputs: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {}

    def end_step(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def statistics(self) -> list[LayerStatistics]:
        return []


class OwnGates:
    """Our decoder's: its layers compute their losses and count their load themselves."""

    def __init__(self, layers: list[MoE]):
        self._layers = layers

    def losses(self, outputs: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
        return outputs.aux_losses

    def end_step(self) -> None:
        for layer in self._layers:
            if layer.gate.weight.requires_grad:  # a frozen router learns nothing in other ways either
                layer.gate.end_step()

    def reset(self) -> None:
        for layer in self._layers:
            layer.reset_stats()

    def statistics(self) -> list[LayerStatistics]:
        return [layer.get_stats() for layer in self._layers]


class WatchedGates:
    """A transformers model's: what its gates are given is recorded, and routed again in float32.

    Releases differ in what they return as router logits; what goes into a gate is the same in all.
    """

    def __init__(self, gates: list[Any], top_k: int, balance_weight: float, z_weight: float):
        self._gates = gates
        self._top_k, self._balance_weight, self._z_weight = top_k, balance_weight, z_weight
        self._logits: list[Tensor] = []
        self._num_tokens = 0
        for gate in gates:
            gate.register_forward_pre_hook(self._record)
        self.reset()

    def losses(self, outputs: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
        # The last pass's: a cache that reads its context in a pass of its own comes before.
        logits, self._logits = self._logits[-len(self._gates) :], []
        mask_T = None if mask is None else mask.reshape(-1).bool()
        balance, z = [], []
        for layer, logits_TE in enumerate(logits):
            probs_TE = logits_TE.softmax(-1)
            chosen_TK = probs_TE.topk(self._top_k, dim=-1).indices
            counts = count_tokens(chosen_TK, probs_TE.shape[-1], mask_T)
            self._load[layer] = self._load[layer] + counts
            entropy, num_tokens = entropy_sum(probs_TE.detach(), mask_T)
            self._entropy[layer] = self._entropy[layer] + entropy
            self._num_tokens = self._num_tokens + int(num_tokens) * (layer == 0)
            balance.append(balance_loss(probs_TE, counts, mask_T))
            z.append(z_loss(logits_TE, mask_T))
        return {
            "balance": self._balance_weight * torch.stack(balance).mean(),
            "z": self._z_weight * torch.stack(z).mean(),
        }

    def end_step(self) -> None:
        pass

    def reset(self) -> None:
        self._load = [
            torch.zeros(gate.weight.shape[0], dtype=torch.int64).to(gate.weight.device) for gate in self._gates
        ]
        self._entropy: list[Tensor | float] = [0.0] * len(self._gates)
        self._num_tokens = 0

    def statistics(self) -> list[LayerStatistics]:
        entropies = total(torch.tensor([float(entropy) for entropy in self._entropy], dtype=torch.float64))
        num_tokens = max(1, int(total(torch.tensor(self._num_tokens))))
        return [
            {
                "expert_tokens": load.tolist(),
                **load_spread(load),
                "router_entropy": entropy / num_tokens,
                "dropped_tokens": 0,
            }
            for load, entropy in zip(map(total, self._load), entropies.tolist())
        ]

    def _record(self, gate: Any, inputs: tuple[Tensor, ...]) -> None:
        x_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
        with torch.autocast(x_TD.device.type, enabled=False):
            self._logits.append(x_TD.float() @ gate.weight.float().T)


def gates_of(model: nn.Module, balance_weight: float, z_weight: float) -> Gates:
    """Return the routers of a model; the weights are for those of transformers, ours have their own."""
    own = [module for module in model.modules() if isinstance(module, MoE)]
    if own:
        return OwnGates(own)
    watched = [
        module for name, module in model.named_modules() if name.endswith("mlp.gate") and hasattr(module, "weight")
    ]
    if not watched:
        return NoGates()
    config: Any = model.config
    return WatchedGates(watched, config.get_text_config().num_experts_per_tok, balance_weight, z_weight)


def load_statistics(layers: list[LayerStatistics]) -> dict[str, float]:
    """Return the load of the least balanced layer, max/mean and coefficient of variation; and the mean hit rate.

    The hit rate is that of a memory of experts, where the router measures it.
    """
    found = {name: max(layer[name] for layer in layers) for name in ("load_max_over_mean", "load_cv") if layers}
    rates = [layer["expert_hit_rate"] for layer in layers if layer.get("expert_hit_rate") is not None]
    return found | ({"expert_hit_rate": sum(rates) / len(rates)} if rates else {})
