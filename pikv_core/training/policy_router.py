"""Routers over cache strategies, trained on a frozen model for the policy `moe-router`.

What a strategy costs in a layer is measured: the KL divergence of the next tokens behind the context from the full
cache's, where that layer alone keeps what the strategy says. The router's loss is the cost that it expects, once over
the layer's mean, which prompts on which much is lost dominate, and once over the prompt's own; and the balance of a
mixture of experts. Noise on the features makes a choice that costs much where it is wrong one that has to be sure.
Shapes: L layers, N lessons (a prompt under one budget), E strategies, F features, B prompts at a time, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pikv_core.cache import PiKVCache
from pikv_core.data import tokens as token_streams
from pikv_core.data.recall import RecallSource
from pikv_core.errors import PiKVError
from pikv_core.evaluation.samples import fingerprint
from pikv_core.model.steps import feed
from pikv_core.runs import Run
from pikv_core.scheduling.moe_router import GIVEN, ROUTER, MoERouter, features, new_router, normalised
from pikv_core.schema import PolicyRouterSettings
from pikv_core.training.held_tokens import held_tokens
from pikv_core.training.interrupt import Interrupt
from pikv_core.training.needles import Needles

AT_A_TIME = 2  # prompts; those drawn together have as many needles
LEAST_COST = 1e-6  # nats, so that prompts on which nothing is lost stay finite
LEAST_SPREAD = 1e-6  # of a feature
EVALUATION_SEED = 20_263


@dataclass(frozen=True)
class Lessons:
    """features [L,N,F]; cost [L,N,E] in nats; agree [L,N,E]: the share of tokens whose greedy choice stays."""

    features: Tensor
    cost: Tensor
    agree: Tensor
    sha256: str
    num_tokens: int


class Prompts(NamedTuple):
    """ids [B,T], of which the first `num_context` are the context; is_answer [B,T] at the token before an answer."""

    ids: Tensor
    num_context: int
    is_answer: Tensor


def domains(needles: Needles) -> tuple[str, ...]:
    """Return what prompts there are: needles anywhere, or with real text around them in either half, and plain text."""
    has_text = isinstance(needles, RecallSource) and bool(needles.streams)
    return ("needles early", "needles late", "text") if has_text else ("needles",)


def draw(
    needles: Needles, domain: str, rng: np.random.Generator, num: int, settings: PolicyRouterSettings, split: str
) -> Prompts:
    """Return `num` prompts of a domain; needles in a half are followed by their questions alone."""
    length = settings.length
    if domain == "needles":
        batch = needles.batch(rng, num, length, split)
        return Prompts(torch.from_numpy(batch.ids), settings.num_context, torch.from_numpy(batch.answer_mask))
    assert isinstance(needles, RecallSource)
    stream = token_streams.of_split(needles.streams, split)
    if domain == "text":
        ids = torch.from_numpy(token_streams.windows(rng, stream, num, length))
        return Prompts(ids, settings.num_context, torch.zeros_like(ids, dtype=torch.bool))
    recall = needles.batch(rng, num, length // 2, split)
    half, asked = np.split(recall.ids, [recall.context_length], axis=1)
    text = token_streams.windows(rng, stream, num, length - length // 2)
    ids = torch.from_numpy(np.concatenate([half, text, asked] if domain == "needles early" else [text, half, asked], 1))
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    is_answer[:, -asked.shape[1] :] = torch.from_numpy(recall.answer_mask[:, recall.context_length :])
    return Prompts(ids, length - asked.shape[1], is_answer)


def untrained(
    model: Any, policy: MoERouter, strategies: Mapping[str, Tensor], seed: int, width: int
) -> dict[str, Tensor]:
    """Return routers as they start, for features of `width`, beside what the strategies have learnt."""
    torch.manual_seed(seed)
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    states = [
        new_router(policy.router, width, len(policy.strategies), policy.top_k).state_dict() for _ in range(num_layers)
    ]
    routers = {f"{ROUTER}{name}": torch.stack([state[name] for state in states]) for name in states[0]}
    plain = {"feature_mean": torch.zeros(num_layers, width), "feature_scale": torch.ones(num_layers, width)}
    return {**routers, **plain, **strategies}


@torch.no_grad()
def gather(
    model: Any,
    recipe: dict[str, Any],
    needles: Needles,
    settings: PolicyRouterSettings,
    num: int,
    seed: int,
    split: str,
) -> Lessons:
    """Return what each strategy costs in each layer on `num` prompts, domains and budgets in turn.

    recipe: of a cache under `moe-router`, without its budget. Raises PiKVError where a number is not finite, and when
    interrupted.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    read: list[Tensor] = []
    kinds = domains(needles)
    with Interrupt() as interrupt:
        for turn, start in enumerate(range(0, num, AT_A_TIME)):
            rng = np.random.default_rng([seed, turn])
            prompts = draw(needles, kinds[turn % len(kinds)], rng, min(AT_A_TIME, num - start), settings, split)
            read.append(prompts.ids)
            for budget in settings.budgets:
                found.append(costs(model, {**recipe, "budget": budget}, prompts))
            if interrupt.wanted:
                raise PiKVError("interrupted: no router is kept", hint="start again; it has no checkpoints")
    x, cost, agree = (torch.cat(parts, dim=1) for parts in zip(*found))
    if not bool(x.isfinite().all() and cost.isfinite().all()):
        raise PiKVError("the model's numbers are not finite", hint="train in --dtype float32")
    ids = torch.cat(read)
    return Lessons(x, cost, agree, fingerprint(ids), ids.numel())


@torch.no_grad()
def costs(model: Any, recipe: dict[str, Any], prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Return features [L,B,F], cost and share of agreeing tokens [L,B,E] of what the contexts lose."""
    ids, num_context, _ = prompts
    context, later = (x.to(model.device) for x in (ids[:, :num_context], ids[:, num_context:]))
    cache = PiKVCache.for_model(model, recipe)
    cache.hold()
    feed(model, cache, context)
    capacity = max(1, int(recipe["budget"] * num_context))
    x = torch.stack([features(held_tokens(layer, capacity)).cpu() for layer in cache.own_layers])
    full = log_probs(model, cache.fork(), later)
    policy = cache.own_layers[0].policy
    assert isinstance(policy, MoERouter)
    cost = torch.zeros(len(x), len(ids), len(policy.strategies))
    agree = torch.zeros_like(cost)
    for index in range(len(x)):
        for strategy in range(len(policy.strategies)):
            own = cache.fork()
            layer = own.own_layers[index]
            layer.run.own[GIVEN] = one_hot(strategy, len(policy.strategies), len(ids), model.device)
            layer.compress()
            found = log_probs(model, own, later)
            cost[index, :, strategy] = (full.exp() * (full - found)).sum(dim=-1).mean(dim=-1).cpu()
            agree[index, :, strategy] = (full.argmax(-1) == found.argmax(-1)).float().mean(dim=-1).cpu()
    return x, cost, agree


def one_hot(strategy: int, num_strategies: int, num_rows: int, device: Any) -> Tensor:
    """Return weights [B,E] that are one strategy's alone."""
    weights = torch.zeros(num_rows, num_strategies, device=device)
    weights[:, strategy] = 1
    return weights


def learn(
    lessons: Lessons, policy: MoERouter, start: Mapping[str, Tensor], settings: PolicyRouterSettings, run: Run
) -> dict[str, Tensor]:
    """Train the routers of all layers from where they `start`; return what the policy goes by."""
    torch.manual_seed(run.recipe.seed)
    mean, spread = lessons.features.mean(dim=1), lessons.features.std(dim=1)
    scale = 1 / spread.clamp(min=LEAST_SPREAD) * lessons.features.shape[-1] ** -0.5
    scale = scale.masked_fill(spread < LEAST_SPREAD, 0.0)  # what never changes tells nothing
    cost = lessons.cost / (lessons.cost.mean(dim=(1, 2), keepdim=True) + LEAST_COST)
    cost = cost + lessons.cost / (lessons.cost.mean(dim=-1, keepdim=True) + LEAST_COST)
    routers = [policy.router_of(start, layer, "cpu").train() for layer in range(len(mean))]
    optimizer = torch.optim.AdamW(
        [weight for router in routers for weight in router.parameters()],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )
    x = normalised(lessons.features, mean[:, None], scale[:, None])
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
            run.telemetry.metrics(step, {"train/loss": loss.item()})
    states = [router.state_dict() for router in routers]
    trained = {f"{ROUTER}{name}": torch.stack([state[name] for state in states]) for name in states[0]}
    return {**start, **trained, "feature_mean": mean, "feature_scale": scale}


@torch.no_grad()
def measure(lessons: Lessons, policy: MoERouter, fitted: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the costs in nats, means over layers and lessons, of choices and of those to compare with.

    chosen: the most likely strategy. best_single: the one strategy that costs least over all. random: each as often.
    oracle: the best in every layer of every prompt. gap_closed: how far chosen is from best_single to oracle.
    """
    cost = lessons.cost
    x = normalised(lessons.features, fitted["feature_mean"][:, None], fitted["feature_scale"][:, None])
    routers = [policy.router_of(fitted, layer, "cpu") for layer in range(len(x))]
    chosen = torch.stack([router.route(own, None).experts[:, :1] for router, own in zip(routers, x)])
    singles = cost.mean(dim=(0, 1))
    best, oracle = float(singles.min()), float(cost.amin(dim=-1).mean())
    reached = float(cost.gather(-1, chosen).mean())
    return {
        "chosen": reached,
        "best_single": best,
        "random": float(cost.mean()),
        "oracle": oracle,
        "gap_closed": (best - reached) / max(best - oracle, LEAST_COST),
        **{f"single/{name}": value for name, value in zip(policy.strategies, singles.tolist())},
    }


def usage(lessons: Lessons, policy: MoERouter, fitted: Mapping[str, Tensor]) -> list[list[float]]:
    """Return how often each layer's router chooses each strategy first: [L,E]."""
    x = normalised(lessons.features, fitted["feature_mean"][:, None], fitted["feature_scale"][:, None])
    E = len(policy.strategies)
    firsts = [policy.router_of(fitted, layer, "cpu").route(own, None).experts[:, 0] for layer, own in enumerate(x)]
    return [(torch.bincount(first, minlength=E) / len(first)).tolist() for first in firsts]


def log_probs(model: Any, cache: PiKVCache, ids: Tensor) -> Tensor:
    """Feed tokens [B,T] and return the log-probabilities [B,T,V] of what comes after each; float32."""
    seen = cache.get_seq_length()
    place: Sequence[int] = range(seen, seen + ids.shape[1])
    position = torch.tensor(place, device=ids.device).expand(len(ids), -1)
    output = model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
    return output.logits.float().log_softmax(dim=-1)
