"""Which expert each token of a layer went to, as the layer's own router says it after the layer's attention.

Shapes: B batch, T new tokens, E experts.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from pikv_core.errors import UsageError

_OF_MODEL: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Routing]] = weakref.WeakKeyDictionary()


class Routing:
    """Hand what a model's routers choose to the cache's layers that have just attended; the caches of a model share it.

    It listens to the routers, the modules of a decoder layer whose weight is [E, hidden_size], for as long as a cache
    holds it. Raises UsageError where a layer has none.
    """

    def __init__(self, model: Any):
        config = model.config.get_text_config(decoder=True)
        self._waiting: dict[int, weakref.ref[Any]] = {}
        heard = weakref.ref(self)
        handles = []
        for index, block in enumerate(model.get_decoder().layers):
            router = _router_of(block, config)
            if router is None:
                raise UsageError(
                    f"layer {index} of model type '{config.model_type}' has no router, and its tokens go to no expert",
                    hint="let keys be clustered: policy expert-shards with by: keys",
                )
            handles.append(router.register_forward_hook(_hook(heard, index)))
        weakref.finalize(self, _remove, handles)

    @classmethod
    def of(cls, model: Any) -> Routing:
        """Return what listens to a model's routers, the same for all of its caches."""
        known = _OF_MODEL.get(model)
        routing = None if known is None else known()
        if routing is None:
            routing = cls(model)
            _OF_MODEL[model] = weakref.ref(routing)
        return routing

    def expect(self, layer: Any) -> None:
        """Let a cache's layer be told next where its newest tokens go."""
        self._waiting[layer.index] = weakref.ref(layer)

    def tell(self, index: int, expert: torch.Tensor) -> None:
        """Tell the layer that waits, if any, the first choice [B·T] of each of its newest tokens."""
        waiting = self._waiting.pop(index, None)
        layer = None if waiting is None else waiting()
        if layer is not None:
            layer.take_experts(expert)

    def __reduce__(self) -> Any:
        return _none, ()  # a copy in another process has no model to listen to


def _none() -> None:
    return None


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _hook(heard: weakref.ref[Routing], index: int) -> Any:
    def tell(module: nn.Module, inputs: Any, output: Any) -> None:
        routing = heard()
        if routing is not None:
            routing.tell(index, _first_choice(output))

    return tell


def _router_of(block: nn.Module, config: Any) -> nn.Module | None:
    """Return the module of a decoder layer that scores its experts."""
    num_experts = next(
        (n for name in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, name, None))),
        None,
    )
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        is_sized = isinstance(weight, torch.Tensor) and tuple(weight.shape) == (num_experts, config.hidden_size)
        if is_sized and "attn" not in name:  # whose projections may be as large
            return module
    return None


def _first_choice(output: Any) -> torch.Tensor:
    """Return the expert [N] that gets most of each token: of our routers' choices, or of logits [..., E]."""
    if hasattr(output, "experts"):
        return output.experts[:, 0]
    logits = output[0] if isinstance(output, tuple) else output
    return logits.detach().flatten(0, -2).argmax(-1)
