"""Routers over cache strategies, trained on a frozen model for the policy `moe-router`.

The router's loss is what it expects to lose over the best single strategy, once relative to that one's mean cost in the
layer, which prompts on which much is lost dominate, and once to the greater of the two costs; and the balance of a
mixture of experts. What a strategy costs in a layer depends on what the others keep: the best single strategy, and in
later rounds what the routers choose. So that a router is not worse than that strategy: noise on the features makes a
choice that costs much where it is wrong one that has to be sure, losses count several times what gains do, and routers
averse to losses to several degrees are compared on prompts of their own.
Shapes: L layers, N lessons (a prompt under one budget), E strategies, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import chain
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pikv_core.collectives import of_first
from pikv_core.errors import PiKVError
from pikv_core.runs import Run
from pikv_core.scheduling import strategy_history
from pikv_core.scheduling.moe_router import ROUTER, MoERouter, new_router, normalised
from pikv_core.schema import PolicyRouterSettings
from pikv_core.training.router_lessons import Choose, Held, Lessons, always, at_random, of_each

MARGINS = (0.0, 1.0, 2.0, 4.0)  # in logits
ALWAYS = 1e4  # a margin that nothing overcomes
MOST_LOST = 20.0  # of what the best single strategy costs: beyond it everything is as bad
LEAST_COST = 1e-6  # nats, so that prompts on which nothing is lost stay finite
LEAST_SPREAD = 1e-6  # of a feature
VALIDATION_SEED, EVALUATION_SEED = 20_262, 20_263


def untrained(
    model: Any, policy: MoERouter, strategies: Mapping[str, Tensor], seed: int, width: int
) -> dict[str, Tensor]:
    """Return routers as they start, for features of `width`, beside what the strategies have learnt.

    Those that are `cache_aware` start with an empty history, where there is none beside it.
    """
    torch.manual_seed(seed)
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    states = [
        new_router(policy.router, width, len(policy.strategies), policy.top_k).state_dict() for _ in range(num_layers)
    ]
    routers = {f"{ROUTER}{name}": torch.stack([state[name] for state in states]) for name in states[0]}
    plain = {"feature_mean": torch.zeros(num_layers, width), "feature_scale": torch.ones(num_layers, width)}
    history = strategy_history.empty(num_layers, len(policy.strategies)) if policy.cache_aware else {}
    return {**routers, **plain, **history, **strategies}


def learn(
    lessons: Lessons,
    policy: MoERouter,
    start: Mapping[str, Tensor],
    settings: PolicyRouterSettings,
    run: Run,
    best: int,
    aversion: float = 1.0,
) -> dict[str, Tensor]:
    """Train the routers of all layers from where they `start`; return what the policy goes by.

    best: the single strategy to improve on. aversion: how much a loss counts of what an equal gain does.
    """
    torch.manual_seed(run.recipe.seed)
    features, history = in_turn(lessons, policy, start)
    mean, spread = features.mean(dim=1), features.std(dim=1)
    scale = 1 / spread.clamp(min=LEAST_SPREAD) * features.shape[-1] ** -0.5
    scale = scale.masked_fill(spread < LEAST_SPREAD, 0.0)  # what never changes tells nothing
    paid = lessons.cost
    if policy.asks:
        paid = paid + settings.mu * lessons.kept
    usual = paid[..., best, None]
    lost = paid - usual
    lost = torch.where(lost > 0, aversion * lost, lost)
    over_layer = (lost / (usual.mean(dim=1, keepdim=True) + LEAST_COST)).clamp(max=MOST_LOST)
    cost = over_layer + lost / (torch.maximum(paid, usual) + LEAST_COST)
    routers = [policy.router_of(start, layer, "cpu").train() for layer in range(len(mean))]
    optimizer = torch.optim.AdamW(
        [weight for router in routers for weight in router.parameters()],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )
    x = normalised(features, mean[:, None], scale[:, None])
    for layer, router in enumerate(routers):
        observe = getattr(router, "observe_hits", None)
        if observe is not None:  # the tokens behind the context that a strategy got right
            observe(lessons.agree[layer].sum(dim=0), torch.full((lessons.agree.shape[-1],), lessons.agree.shape[1]))
    for step in range(1, settings.steps + 1):
        drawn = torch.randint(x.shape[1], (min(settings.batch, x.shape[1]),))
        losses = []
        for layer, router in enumerate(routers):
            noise = settings.noise * torch.randn(len(drawn), x.shape[-1]) * x.shape[-1] ** -0.5
            noise[:, -1] = 0
            routing = router.route(x[layer, drawn] + noise, None)
            expected = (routing.probs * cost[layer, drawn]).sum(dim=-1).mean()
            losses.append(expected + settings.balance * routing.losses["balance"])
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise PiKVError(f"the loss is {loss.item()} at step {step}", hint="lower policy_router.lr")
        if step % settings.log_every == 0 or step == settings.steps:
            run.reporter.progress(f"training routers: step {step}, loss {loss.item():.4f}", step, settings.steps)
            first = torch.stack([router.route(own, None).experts[:, 0] for router, own in zip(routers, x)])
            used = {name: float((first == at).float().mean()) for at, name in enumerate(policy.strategies)}
            told = {"train/loss": loss.item(), **{f"usage/{name}": share for name, share in used.items()}}
            run.telemetry.metrics(step, {f"{tag}/aversion_{aversion:g}": value for tag, value in told.items()})
    states = [router.state_dict() for router in routers]
    trained = {f"{ROUTER}{name}": torch.stack([state[name] for state in states]) for name in states[0]}
    return {**start, **trained, **history, "feature_mean": mean, "feature_scale": scale}


def learn_each(
    lessons: Lessons,
    policy: MoERouter,
    start: Mapping[str, Tensor],
    settings: PolicyRouterSettings,
    run: Run,
    best: int,
) -> dict[float, dict[str, Tensor]]:
    """Train routers to each of the degrees of aversion; rank 0 does, and every rank has the same."""

    def train() -> dict[float, dict[str, Tensor]]:
        return {own: learn(lessons, policy, start, settings, run, best, own) for own in settings.aversions}

    return of_first(train)


def in_turn(lessons: Lessons, policy: MoERouter, start: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return features [L,N,F] with what the history said before each lesson, and the history after all of them.

    So no lesson reads what it has taught itself.
    """
    if not policy.cache_aware:
        return lessons.features, {}
    cost = strategy_history.relative(lessons.cost, LEAST_COST)
    before, history = strategy_history.observe(start, *policy.measured(lessons.features), cost)
    return policy.told(lessons.features, before), history


def choice(policy: MoERouter, fitted: Mapping[str, Tensor]) -> Choose:
    """Return what routers choose."""
    routers = [policy.router_of(fitted, layer, "cpu") for layer in range(len(fitted["feature_mean"]))]

    @torch.no_grad()
    def choose(held: Held) -> Tensor:
        features = torch.stack([policy.with_history(x, fitted, layer) for layer, x in enumerate(held.features)])
        x = normalised(features, fitted["feature_mean"][:, None], fitted["feature_scale"][:, None])
        routings = [router.route(own, None) for router, own in zip(routers, x)]
        experts, weights = (torch.stack([getattr(own, name) for own in routings]) for name in ("experts", "weights"))
        return torch.zeros(held.shape).scatter(-1, experts, weights)

    return choose


def leaning(fitted: Mapping[str, Tensor], strategy: int, margin: float) -> dict[str, Tensor]:
    """Return routers that take another strategy than this one only where it is ahead by a margin, in logits."""
    weight = fitted[f"{ROUTER}weight"].clone()
    weight[:, strategy, -1] += margin  # times the feature that is always 1
    return {**fitted, f"{ROUTER}weight": weight}


def best_single(prompts: Iterable[Held]) -> int:
    """Return the one strategy that costs least over all."""
    cost = of_each(prompts, lambda held: held.together([always(strategy) for strategy in range(held.shape[2])]))
    return int(torch.cat(cost).mean(dim=0).argmin())


def hedge(
    prompts: Iterable[Held], policy: MoERouter, learnt: Mapping[float, Mapping[str, Tensor]], best: int
) -> tuple[dict[str, Tensor], float | None, float]:
    """Return of the routers by their aversion those that surely gain most, leaning to the `best` single strategy.

    With them, their aversion, and by what margin they lean. Of prompts of which nothing was learnt: the mean gain over
    the single strategy, less its standard error, is the greatest. Where it is not above 0 they take the single strategy
    ALWAYS, and no aversion is told.
    """
    leant = {(aversion, margin): leaning(own, best, margin) for aversion, own in learnt.items() for margin in MARGINS}
    choices = [always(best), *(choice(policy, own) for own in leant.values())]
    cost = torch.cat(of_each(prompts, lambda held: held.together(choices)))
    gain = cost[:, :1] - cost[:, 1:]
    sure = gain.mean(dim=0) - gain.std(dim=0) * len(gain) ** -0.5
    if bool(sure.max() <= 0):
        return leaning(next(iter(learnt.values())), best, ALWAYS), None, ALWAYS
    aversion, margin = list(leant)[int(sure.argmax())]
    return leant[aversion, margin], aversion, margin


def measure(
    prompts: Iterable[Held],
    policy: MoERouter,
    fitted: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    seed: int,
) -> tuple[dict[str, float], Tensor, list[str]]:
    """Return the costs in nats, means over prompts, of choices for all layers; what was chosen [L,N,E], of which kinds.

    chosen: by the routers; untrained: by those they `start` as. best_single: the one strategy that costs least over
    all. random: any. oracle: see `Held.oracle`. gap_closed: how far chosen is from best_single to oracle.
    """
    routers = choice(policy, fitted)
    named = {name: always(strategy) for strategy, name in enumerate(policy.strategies)}
    others: dict[str, Choose] = {
        "chosen": routers,
        "untrained": choice(policy, start),
        "random": at_random(seed),
        "oracle": methodcaller("oracle"),
    }

    def found_of(held: Held) -> tuple[Tensor, Tensor, list[str]]:
        cost = held.together([*named.values(), *others.values()])
        return cost, routers(held), [held.kind] * held.shape[1]

    cost, chosen, kinds = zip(*of_each(prompts, found_of))
    means = torch.cat(cost).mean(dim=0).tolist()
    singles, found = dict(zip(named, means)), dict(zip(others, means[len(named) :]))
    found["best_single"] = min(singles.values())
    gap = found["best_single"] - found["oracle"]
    found["gap_closed"] = (found["best_single"] - found["chosen"]) / max(gap, LEAST_COST)
    metrics = {**found, **{f"single/{name}": value for name, value in singles.items()}}
    return metrics, torch.cat(chosen, dim=1), list(chain.from_iterable(kinds))


def usage(weights: Tensor) -> list[list[float]]:
    """Return how often each layer chooses each strategy first [L,E], of weights [L,N,E]."""
    first = functional.one_hot(weights.argmax(dim=-1), weights.shape[-1])
    return first.float().mean(dim=1).tolist()
