"""The press of `moe-router`: any policy's press, which also tells what its routers chose for the last prompt.

Shapes: B batch, G key/value heads, K kept slots, E strategies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from pikv_core.components import Component
from pikv_core.errors import UsageError
from pikv_core.presses import PRESSES
from pikv_core.presses.policy_press import PolicyPress
from pikv_core.scheduling.base import Evictor
from pikv_core.scheduling.moe_router import WEIGHTS, MoERouter


@dataclass(frozen=True)
class HeardRouter(MoERouter):
    """The policy, and of the layer that it scored last the strategies' weights [B,E] and the router's balance loss."""

    heard: dict[str, torch.Tensor] = field(default_factory=dict, init=False, compare=False)

    def score(self, tokens: Any) -> torch.Tensor:
        score = super().score(tokens)
        self.heard["weights"] = tokens.layer.own[WEIGHTS]
        return score

    def router_of(self, fitted: Mapping[str, torch.Tensor], layer: int, device: Any) -> Any:
        router: Any = super().router_of(fitted, layer, device)
        router.route = functools.partial(self._hear, router.route)
        return router

    def _hear(self, route: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routing = route(*args, **kwargs)
        self.heard["balance"] = routing.losses["balance"]
        return routing


@dataclass(frozen=True)
class Choice:
    """What a layer's router chose for a prompt.

    aux_loss: its balance loss over the rows, None where nothing was to be dropped and it was not asked. expert_usage:
    rows that each strategy decided, kept_tokens: tokens that stayed of these rows, over heads; both by the strategy's
    name, and of a mixture the share that the router's weights say.
    """

    aux_loss: float | None
    expert_usage: dict[str, float]
    kept_tokens: dict[str, float]

    @property
    def plain(self) -> dict[str, Any]:
        of_experts = asdict(self)
        return {"aux_loss": of_experts.pop("aux_loss"), "expert_compression_stats": of_experts}


@PRESSES.register("moe-router")
@dataclass
class RouterPress(PolicyPress):
    """num_experts: how many strategies there have to be, those of the calibration where none are given; None for any.

    router_type: the policy's option `router`. compression_ratio is half, since at 0 no router is asked.
    """

    compression_ratio: float = 0.5
    num_experts: int | None = field(default=None, kw_only=True)
    called: ClassVar[Mapping[str, str]] = {"router": "router_type"}

    def __post_init__(self) -> None:
        self._choices: dict[int, Choice] = {}
        super().__post_init__()
        strategies = self._policy.strategies
        if strategies != tuple(self.options["strategies"]):
            self._check_num_experts(strategies)

    @property
    def _policy(self) -> HeardRouter:
        policy = self._evictor
        assert isinstance(policy, HeardRouter)
        return policy

    def _build(self, component: Component) -> Evictor:
        policy = super()._build(component)
        return HeardRouter(**{one.name: getattr(policy, one.name) for one in dataclasses.fields(MoERouter) if one.init})

    def _check_num_experts(self, strategies: Sequence[str]) -> None:
        if self.num_experts not in (None, len(strategies)):
            raise UsageError(
                f"{type(self).__name__}: num_experts: there are {len(strategies)} strategies, "
                f"{', '.join(strategies)}, not {self.num_experts}",
                hint="drop num_experts, or give as many strategies and a calibration of routers over them",
            )

    def post_init_from_model(self, model: Any) -> None:
        """Take the routers of a model; raises UsageError for another model's or number, and for mode native's."""
        super().post_init_from_model(model)
        if self._policy.asks:
            raise UsageError(
                "policy 'moe-router' in mode native compares layers, and a press never holds them all",
                hint="use PiKVCache, or routers that were trained in mode budget",
            )
        self._check_num_experts(self._policy.strategies)

    def compress(self, module: Any, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept keys and values [B,G,K,D], and remember what the router chose."""
        policy, layer = self._policy, module.layer_idx
        policy.heard.clear()
        kept = super().compress(module, *given, **named)
        if policy.heard:
            share = policy.heard["weights"].double().cpu()
            num_kept = (self.positions[layer] >= 0).sum(dim=(1, 2)).double().cpu()
            by_name = [dict(zip(policy.strategies, x.tolist())) for x in (share.sum(dim=0), num_kept @ share)]
            self._choices[layer] = Choice(float(policy.heard["balance"]), *by_name)
        else:
            none = dict.fromkeys(policy.strategies, 0.0)
            self._choices[layer] = Choice(None, none, none)
        return kept

    def get_stats(self) -> dict[str, Any]:
        """Return what any press tells, `avg_aux_loss`, the mean of the layers', and for each layer a `Choice`.

        `avg_aux_loss` is None where no layer asked its router. Raises UsageError as any press does.
        """
        stats = super().get_stats()
        for index, layer in stats["layer_stats"].items():
            layer |= self._choices[index].plain
        losses = [layer["aux_loss"] for layer in stats["layer_stats"].values() if layer["aux_loss"] is not None]
        return {**stats, "avg_aux_loss": sum(losses) / len(losses) if losses else None}
