"""A router over strategies: for each layer and prompt a learnt mixture of other policies decides what stays.

Shapes: B batch, L layers, G key/value heads, S stored tokens, D head dim, E strategies, K of them chosen, F features,
N prompts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from pikv_core.components import Component, build
from pikv_core.errors import PiKVError, UsageError
from pikv_core.observation import WHOLE, LayerRun, Rows
from pikv_core.scheduling import POLICIES, strategy_history
from pikv_core.scheduling.base import Evictor, Tokens
from pikv_core.scheduling.hit_rates import hit_rates

if TYPE_CHECKING:
    import torch

    from pikv_core.moe.router import Router

MASS = "attention"
WEIGHTS, GIVEN = f"{WHOLE}moe-router/weights", f"{WHOLE}moe-router/given"
ROUTER = "router/"  # in the names of a calibration's tensors: what is the router's, one for each layer
WINDOW = 64  # newest queries of a prompt whose attention the router looks at
ODD = 16  # keys of a head that are looked at because they are least like the others
TINY = 1e-6  # keeps quotients and logarithms finite

Columns = Mapping[str, "torch.Tensor"]
Scores = Callable[[str], "torch.Tensor"]  # a strategy's [B,G,S], by its name


@POLICIES.register("moe-router")
@dataclass(frozen=True)
class MoERouter(Evictor):
    """Keep what the best of several policies would keep, by a router that was trained on what each of them loses.

    A router for each layer (`router`: one of the routers of mixtures of experts) looks once, at the end of the prompt,
    at the mean key and the oddest ones, the longest value, how even attention is, the length and the budget. With
    `top_k` above 1 the ranks that the strategies give the tokens are mixed by the router's weights. What the routers
    and the strategies have learnt is in `LayerRun.fitted`. `LayerRun.own` tells the weights [B,E] that were taken, and
    may give others beforehand. `cache_aware` routers also look at each strategy's hit rate, the share of the newest
    queries' attention on what it would keep, and at what such a strategy cost before (`strategy_history`); every
    strategy scores the tokens for that.

    mode: under "budget" every strategy has the whole budget, in every layer. Under "native" the layers share one
    budget, in proportion to the share of the tokens that the strategy chosen in each stands for (`native_share`), the
    mean budget where it stands for none; chosen anew for every prompt as long as nothing is gone, then for good.
    """

    calibrated: ClassVar[bool] = True
    fitted_by: ClassVar[str] = "policy-router"
    decides_once: ClassVar[bool] = True
    heads_apart: ClassVar[bool] = True
    listed: ClassVar[str] = "strategies"  # what `moe-router:snapkv+semantic` names
    strategies: tuple[str, ...] = ("aggressive", "moderate", "conservative", "snapkv", "semantic", "temporal")
    router: Literal["base", "pikv"] = "base"
    top_k: Annotated[int, Field(ge=1)] = 1
    mode: Literal["budget", "native"] = "budget"
    cache_aware: bool = False
    members: ClassVar[dict[str, Evictor]]

    def __post_init__(self) -> None:
        if len(set(self.strategies)) < max(2, len(self.strategies), self.top_k):
            raise UsageError(
                f"policy '{self.name}' needs two different strategies or more, and top_k of them at least, "
                f"got '{'+'.join(self.strategies)}' and top_k {self.top_k}",
                hint=f"for example {self.name}:snapkv+semantic",
            )
        for name in self.strategies:
            reason = unfit(POLICIES[name])
            if reason:
                fit = ", ".join(known for known in POLICIES.names() if not unfit(POLICIES[known]))
                raise UsageError(f"policy '{name}' {reason}, which a router cannot use", hint=f"it takes: {fit}")
        members = {name: build(POLICIES, Component(name)) for name in self.strategies}
        own = [_own(name, column) for name, member in members.items() for column in member.columns]
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "columns", (MASS, *own))
        object.__setattr__(self, "reads", tuple({"keys", "values", "rotary", *_all_reads(members)}))

    @property
    def observes(self) -> int:
        return max(WINDOW, *(member.observes for member in self.members.values()))

    def observe(self, columns: Columns, rows: Rows) -> None:
        for name, member in self.members.items():
            seen = rows.newest(member.observes) if member.observes else None
            if seen is not None:
                member.observe(_columns_of(name, columns), seen)
        newest = rows.newest(WINDOW)
        if newest is not None:
            if newest.is_first:
                columns[MASS].zero_()
            columns[MASS].add_(newest.column_sums())

    def score(self, tokens: Tokens) -> torch.Tensor:
        import torch

        score_of = self._scores(tokens)
        is_part = tokens.head.shape[1] < tokens.layer.num_kv_heads  # heads that hold unequally much are stored apart
        if self.asks:
            weights = self._asked_with(tokens.layer)
        elif is_part and WEIGHTS in tokens.layer.own:
            weights = tokens.layer.own[WEIGHTS]  # as chosen while the layer was in one place
        else:
            weights = self.choose(tokens, score_of)
        tokens.layer.own[WEIGHTS] = weights
        own = weights[tokens.row.to(weights.device)]
        mixed = torch.zeros(tokens.position.shape, device=tokens.position.device)
        for name, weight in zip(self.strategies, own.to(mixed.device)[..., None, None].unbind(dim=1)):
            if not bool(weight.any()):
                continue
            score = score_of(name)
            if not bool(((weight == 0) | (weight == 1)).all()):  # ranks cost sorting, and one score alone needs none
                mixed = mixed + weight * ranks(score, tokens.position)
            mixed = torch.where(weight == 1, score, mixed)
        return mixed

    @property
    def asks(self) -> bool:
        return self.mode == "native"

    def ask(self, tokens: Tokens) -> torch.Tensor:
        weights = tokens.layer.own[WEIGHTS] = self.choose(tokens)
        mean = tokens.capacity.double().mean(dim=1) / tokens.num_seen.clamp(min=1)
        asked = (weights.to(mean.device).double() * self.shares(mean)).sum(dim=-1)
        return asked.masked_fill(tokens.num_seen == 0, 0.0)  # nothing is known of a row that is padding alone

    def shares(self, mean: torch.Tensor) -> torch.Tensor:
        """Return the share [B,E] of the tokens seen that each strategy stands for, the `mean` [B] where it has none."""
        import torch

        native = [member.native_share for member in self.members.values()]
        return torch.stack([mean if own is None else torch.full_like(mean, own) for own in native], dim=-1)

    def _asked_with(self, layer: LayerRun) -> torch.Tensor:
        """Return the weights [B,E] by which a layer has asked for its part of the budget."""
        weights = layer.own.get(GIVEN, layer.own.get(WEIGHTS))
        if weights is None:
            raise UsageError(
                f"policy '{self.name}' in mode native sizes a layer when all of them have been seen, and this one has "
                "to drop tokens before",
                hint="use PiKVCache, which holds a prompt until then, or routers trained in mode budget",
            )
        chosen: torch.Tensor = weights
        return chosen

    def choose(self, tokens: Tokens, score_of: Scores | None = None) -> torch.Tensor:
        """Return the weights [B,E] of the strategies, which sum to 1; those given beforehand come first.

        score_of: what the strategies make of the tokens, where somebody knows.
        """
        import torch

        if GIVEN in tokens.layer.own:
            return tokens.layer.own[GIVEN]
        x, fitted, layer = self.look(tokens, score_of), tokens.layer.fitted, tokens.layer
        expected = (layer.num_layers, len(self.strategies), x.shape[-1])
        given = tuple(fitted[f"{ROUTER}weight"].shape)
        if given != expected:
            raise PiKVError(
                f"policy '{self.name}' has routers for layers, strategies and features {given}, and needs {expected}",
                hint="give the calibration that was made for this model and these strategies",
            )
        x = self.with_history(x, fitted, layer.index)
        mean, scale = (fitted[name][layer.index].to(x.device) for name in ("feature_mean", "feature_scale"))
        with torch.no_grad():
            routing = self.router_of(fitted, layer.index, x.device).route(normalised(x, mean, scale), None)
        return torch.zeros(len(x), len(self.strategies), device=x.device).scatter(1, routing.experts, routing.weights)

    def look(self, tokens: Tokens, score_of: Scores | None = None) -> torch.Tensor:
        """Return what the router is told of the tokens, float32 [B,F], all but what `with_history` fills in."""
        import torch

        x = features(tokens)
        if not self.cache_aware:
            return x
        scores = map(score_of or self._scores(tokens), self.strategies)
        of_heads = hit_rates(tokens.columns[MASS], scores, tokens.position, tokens.capacity)
        rates = tokens.layer.gather_heads(of_heads).mean(dim=1)
        return torch.cat([x[:, :-1], rates, torch.zeros_like(rates), x[:, -1:]], dim=-1)

    def with_history(self, x: torch.Tensor, fitted: Mapping[str, torch.Tensor], layer: int) -> torch.Tensor:
        """Return features [N,F] of a layer with what the table in `fitted` says of each strategy there."""
        if not self.cache_aware:
            return x
        return self.told(x, strategy_history.read(fitted[strategy_history.COST][layer], *self.measured(x)))

    def told(self, x: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """Return features [...,F] of a `cache_aware` router with `history` [...,E] filled in."""
        import torch

        return torch.cat([x[..., : -1 - len(self.strategies)], history, x[..., -1:]], dim=-1)

    def measured(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logarithm of a prompt's tokens [...] and the hit rates [...,E] among features [...,F]."""
        E = len(self.strategies)
        return x[..., -2 * E - 3], x[..., -2 * E - 1 : -E - 1]

    def width(self, head_dim: int) -> int:
        """Return F of a layer with heads of so many channels."""
        return num_features(head_dim) + (2 * len(self.strategies) if self.cache_aware else 0)

    def _scores(self, tokens: Tokens) -> Scores:
        """Return what tells a strategy's score of the tokens by its name, and takes it once."""
        return functools.cache(lambda name: self.member_score(name, tokens))

    def router_of(self, fitted: Mapping[str, torch.Tensor], layer: int, device: Any) -> Router:
        """Return a layer's router as it was learnt."""
        state = {name.removeprefix(ROUTER): x[layer] for name, x in fitted.items() if name.startswith(ROUTER)}
        router = new_router(self.router, state["weight"].shape[1], len(self.strategies), self.top_k)
        router.load_state_dict(state)
        return router.to(device).eval()

    def member_score(self, name: str, tokens: Tokens) -> torch.Tensor:
        """Return what a strategy makes of the tokens [B,G,S]."""
        learnt = {
            key.removeprefix(f"{name}/"): x for key, x in tokens.layer.fitted.items() if key.startswith(f"{name}/")
        }
        layer = dataclasses.replace(tokens.layer, fitted=learnt)
        columns = dict(_columns_of(name, tokens.columns))
        return self.members[name].score(dataclasses.replace(tokens, columns=columns, layer=layer))


def features(tokens: Tokens) -> torch.Tensor:
    """Return float32 [B,F] of the tokens of a row: means and extremes over heads, what the prompt is, and a 1.

    Of a head's keys before their rotation: the mean direction, that of the ODD keys least like it, and their cosine.
    """
    import torch
    from torch.nn import functional

    layer, position = tokens.layer, tokens.position
    is_token = position >= 0
    counted = is_token.sum(dim=-1).clamp(min=1)  # [B,G]
    plain = layer.rotary_for(MoERouter.name).unrotate(tokens.keys().float(), position.clamp(min=0), layer.index)
    keys_length = plain.norm(dim=-1).clamp(min=TINY)
    weight = (1 / keys_length).masked_fill(~is_token, 0.0)  # makes directions of keys, which are not written down
    mean = (weight[:, :, None] @ plain)[:, :, 0] / counted[..., None]
    likeness = (plain @ functional.normalize(mean, dim=-1)[..., None])[..., 0] * weight
    odd = likeness.masked_fill(~is_token, torch.inf).topk(min(ODD, position.shape[-1]), dim=-1, largest=False)
    num_odd = counted.clamp(max=ODD)
    odd_likeness = odd.values.masked_fill(odd.values == torch.inf, 0.0).sum(dim=-1) / num_odd
    chosen = odd.indices[..., None].expand(*odd.indices.shape, plain.shape[-1])
    odd_mean = (plain.gather(2, chosen) * weight.gather(2, odd.indices)[..., None]).sum(dim=2) / num_odd[..., None]
    length = tokens.values().float().norm(dim=-1).masked_fill(~is_token, 0.0)
    usual = (length.sum(dim=-1) / counted).clamp(min=TINY)
    share = tokens.columns[MASS].masked_fill(~is_token, 0.0)
    share = share / share.sum(dim=-1, keepdim=True).clamp(min=TINY)
    evenness = torch.special.entr(share).sum(dim=-1) / counted.float().log().clamp(min=TINY)
    extremes = torch.stack([odd.values[..., 0], odd_likeness, length.amax(dim=-1) / usual, evenness], dim=-1)
    of_heads = layer.gather_heads(torch.cat([mean, odd_mean, extremes], dim=-1))
    seen = tokens.num_seen.float().clamp(min=1)
    kept = (tokens.capacity.float().mean(dim=1) / seen).clamp(min=TINY, max=1)
    of_prompt = torch.stack([seen.log(), kept.log(), torch.ones_like(seen)], dim=-1)
    most = of_heads[..., -extremes.shape[-1] :].amax(dim=1)
    x = torch.cat([of_heads.mean(dim=1), most, of_prompt], dim=-1)
    assert x.shape[-1] == num_features(plain.shape[-1])
    return x


def num_features(head_dim: int) -> int:
    """Return how many `features` there are with heads of so many channels."""
    return 2 * head_dim + 11


def normalised(x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return features [...,F] around 0 but for the last, which is 1."""
    import torch

    return torch.cat([((x - mean) * scale)[..., :-1], x[..., -1:]], dim=-1)


def new_router(kind: str, num_features: int, num_strategies: int, top_k: int) -> Router:
    """Return an untrained router of a kind that `moe-router` takes."""
    from pikv_core.moe.routers import ROUTERS

    return ROUTERS[kind](num_features, num_strategies, top_k)


def ranks(score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return the tokens' order [B,G,S] by score, older first on ties, from 0 to 1; empty slots come first."""
    import torch

    score = score.masked_fill(position < 0, -torch.inf)
    by_age = position.argsort(dim=-1, stable=True)
    rank = by_age.gather(-1, score.gather(-1, by_age).argsort(dim=-1, stable=True)).argsort(dim=-1).float()
    empty = (position < 0).sum(dim=-1, keepdim=True)
    return (rank - empty) / (position.shape[-1] - empty).clamp(min=1)


def unfit(policy: Any) -> str | None:
    """Return why a policy cannot be a strategy, None where it can."""
    if not issubclass(policy, Evictor):
        return "drops no tokens"
    if policy.name in (MoERouter.name, "switch"):
        return "chooses among policies itself"
    if policy.looks is not None:
        return "has to be shown more than the prompt"
    if policy.sees_queries:
        return "learns from queries"
    if policy.capacity is not Evictor.capacity:
        return "has budgets of its own"
    return None


def _all_reads(members: Mapping[str, Evictor]) -> set[str]:
    return {name for member in members.values() for name in member.reads}


def _own(name: str, column: str) -> str:
    return f"{name}.{column}"


def _columns_of(name: str, columns: Columns) -> Columns:
    """Return a strategy's columns under the names it knows."""
    return {key.removeprefix(_own(name, "")): x for key, x in columns.items() if key.startswith(_own(name, ""))}
