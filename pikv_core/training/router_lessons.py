"""What cache strategies lose on a frozen model, measured: the lessons of the routers of `moe-router`.

A loss is the KL divergence, in nats, of the tokens behind a context from the full cache's, mean over those tokens.
Under torchrun each rank measures some of the prompts, and all know what every one of them found.
Shapes: L layers, N lessons (a prompt under one budget), E strategies, F features, B prompts at a time, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pikv_core.cache import PiKVCache
from pikv_core.cache.budget import Budget
from pikv_core.collectives import apart, dealt, end_all, everyones
from pikv_core.data import tokens as token_streams
from pikv_core.data.recall import RecallSource
from pikv_core.errors import PiKVError
from pikv_core.evaluation.samples import fingerprint
from pikv_core.model.steps import feed
from pikv_core.scheduling.allocation.asked import ASKED
from pikv_core.scheduling.moe_router import GIVEN, MoERouter
from pikv_core.schema import PolicyRouterSettings
from pikv_core.training.held_tokens import held_tokens
from pikv_core.training.interrupt import Interrupt
from pikv_core.training.needles import Needles

T = TypeVar("T")

AT_A_TIME = 2  # prompts; those drawn together have as many needles


@dataclass(frozen=True)
class Lessons:
    """features [L,N,F]; cost [L,N,E] in nats; agree [L,N,E]: the share of tokens whose greedy choice stays.

    A cost is of one layer under one strategy, the other layers keeping what somebody chose. kept [N,E]: the share of a
    context that a layer keeps of it; it counts in mode native.
    """

    features: Tensor
    cost: Tensor
    agree: Tensor
    kept: Tensor
    sha256: str
    num_tokens: int


class Prompts(NamedTuple):
    """ids [B,T], of which the first `num_context` are the context; is_answer [B,T] at the token before an answer."""

    ids: Tensor
    num_context: int
    is_answer: Tensor

    @property
    def lengths(self) -> list[int]:
        return [self.num_context, self.ids.shape[1] - self.num_context]


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


class Held:
    """Prompts whose contexts a cache under `moe-router` holds whole, so that what a choice would lose can be measured.

    recipe: of the cache, with its budget. features [L,B,F]; full [B,T,V]: the full cache's log-probabilities; kept [E]:
    the share of the context at which a strategy's cost in a layer is measured, in mode native its own. kind: of the
    prompts and their budget, for whoever tells of them. place: their turn, and which of the budgets it is.
    """

    @torch.no_grad()
    def __init__(
        self, model: Any, recipe: dict[str, Any], prompts: Prompts, kind: str = "", place: tuple[int, int] = (0, 0)
    ):
        context, later = (x.to(model.device) for x in prompts.ids.split_with_sizes(prompts.lengths, dim=1))
        self._model, self.later, self.prompts, self.kind, self.place = model, later, prompts, kind, place
        self.cache = PiKVCache.for_model(model, recipe)
        self.cache.hold()
        feed(model, self.cache, context)
        policy = self.cache.own_layers[0].policy
        assert isinstance(policy, MoERouter)
        self.policy = policy
        capacity = max(1, int(recipe["budget"] * prompts.num_context))
        self.features = torch.stack(
            [policy.look(held_tokens(layer, capacity)).cpu() for layer in self.cache.own_layers]
        )
        self.kept = self._kept(capacity / prompts.num_context)
        self.full = log_probs(model, self.cache.fork(), later)

    def _kept(self, asked: float) -> Tensor:
        mean = torch.tensor([asked], dtype=torch.float64)
        if self.policy.asks:
            return self.policy.shares(mean)[0]
        return mean.expand(len(self.policy.strategies))

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, B and E."""
        return len(self.features), self.features.shape[1], len(self.policy.strategies)

    @torch.no_grad()
    def compressed(self, weights: Tensor | None, but: int | None = None) -> PiKVCache:
        """Return a cache whose layers keep what strategies of these weights [L,B,E] say; layer `but` is still held.

        None: what the router says. All layers together have the budget, in mode native too.
        """
        cache = self.cache.fork()
        if weights is not None:
            for layer, own in zip(cache.own_layers, weights):
                layer.run.own[GIVEN] = own.to(self._model.device)
        cache.ask()
        for layer in cache.own_layers:
            if layer.index != but:
                layer.compress()
        return cache

    @torch.no_grad()
    def lost(self, cache: PiKVCache) -> tuple[Tensor, Tensor]:
        """Return what a cache has lost, and the share of tokens whose greedy choice stays, [B] each; it is used up."""
        cache.hold()  # nothing comes after these tokens
        found = log_probs(self._model, cache, self.later)
        kl = (self.full.exp() * (self.full - found)).sum(dim=-1).mean(dim=-1)
        return kl.cpu(), (self.full.argmax(-1) == found.argmax(-1)).float().mean(dim=-1).cpu()

    def together(self, choices: Sequence[Choose]) -> Tensor:
        """Return what each of C choices for all layers costs: [B,C]."""
        return torch.stack([self.lost(self.compressed(choose(self)))[0] for choose in choices], dim=-1)

    def costs(self, others: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return cost and agreement [L,B,E] of each strategy in a layer, the others under weights [L,B,E] or whole."""
        found = [self._layer_costs(index, others) for index in range(len(self.features))]
        cost, agree = (torch.stack(parts) for parts in zip(*found))
        return cost, agree

    def oracle(self) -> Tensor:
        """Return weights [L,B,E]: from the best single strategy on, layer after layer the one that then loses least."""
        L, _, E = self.shape
        best = self.together([always(strategy) for strategy in range(E)]).argmin(dim=-1)
        weights = functional.one_hot(best, E).float().repeat(L, 1, 1)
        for index in range(L):
            best = self._oracle_costs(index, weights).argmin(dim=-1)
            weights[index] = functional.one_hot(best, E)
        return weights

    def _oracle_costs(self, index: int, weights: Tensor) -> Tensor:
        """Return what each strategy in a layer costs [B,E], the others under weights [L,B,E], under the same budget."""
        if not self.policy.asks:
            return self._layer_costs(index, weights)[0]
        _, B, E = self.shape
        before, after = weights[:index], weights[index + 1 :]
        each = [torch.cat([before, one_hot(strategy, E, B)[None], after]) for strategy in range(E)]
        return torch.stack([self.lost(self.compressed(own))[0] for own in each], dim=-1)

    @torch.no_grad()
    def _layer_costs(self, index: int, others: Tensor | None) -> tuple[Tensor, Tensor]:
        _, B, E = self.shape
        base = self.cache.fork() if others is None else self.compressed(others, but=index)
        found = []
        for strategy in range(E):
            cache = base.fork()
            layer = cache.own_layers[index]
            layer.run.own[GIVEN] = one_hot(strategy, E, B).to(self._model.device)
            if self.policy.asks:
                layer.run.shared.pop(ASKED, None)  # the layer alone, so that it is given what its budget says
                layer.budgets.budget = Budget(float(self.kept[strategy]))
            layer.compress()
            found.append(self.lost(cache))
        cost, agree = (torch.stack(parts, dim=-1) for parts in zip(*found))
        return cost, agree


Choose = Callable[[Held], Tensor]  # weights [L,B,E] of the strategies


def held_prompts(
    model: Any,
    recipe: dict[str, Any],
    needles: Needles,
    settings: PolicyRouterSettings,
    num: int,
    seed: int,
    split: str,
) -> Iterator[Held]:
    """Yield this rank's turns of `num` prompts: a few at a time under each budget, domains in turn.

    recipe: of a cache under `moe-router`, without its budget. A turn depends on the seed and its number alone.
    """
    kinds = domains(needles)
    for turn, start in dealt(list(enumerate(range(0, num, AT_A_TIME)))):
        rng = np.random.default_rng([seed, turn])
        kind = kinds[turn % len(kinds)]
        prompts = draw(needles, kind, rng, min(AT_A_TIME, num - start), settings, split)
        for at, budget in enumerate(settings.budgets):
            yield Held(model, {**recipe, "budget": budget}, prompts, f"{kind}\n{budget:g}", (turn, at))


def of_each(prompts: Iterable[Held], measure: Callable[[Held], T]) -> list[T]:
    """Measure this rank's prompts; return what was found of every rank's, in the order of their places.

    Every rank has to ask. Where one is interrupted all end, rank 0 with a PiKVError.
    """
    found: list[tuple[tuple[int, int], T]] = []
    with Interrupt() as interrupt:
        with apart():
            for held in prompts:
                found.append((held.place, measure(held)))
                if interrupt.wanted:
                    break
        told = everyones((found, interrupt.wanted))
    if any(wanted for _, wanted in told):
        end_all(PiKVError("interrupted: no router is kept", hint="start again; it has no checkpoints"))
    return [one for _, one in sorted((pair for own, _ in told for pair in own), key=itemgetter(0))]


def gather(prompts: Iterable[Held], others: Choose | None) -> Lessons:
    """Return what each strategy costs in each layer, the others keeping what is chosen for them, or whole.

    Raises PiKVError where a number is not finite.
    """

    def measure(held: Held) -> tuple[Tensor, ...]:
        ids = held.prompts.ids.flatten()
        own = ids if held.place[1] == 0 else ids[:0]  # the next budgets read the same again
        kept = held.kept.float().expand(held.shape[1:])
        return own, kept, held.features, *held.costs(None if others is None else others(held))

    ids, kept, x, cost, agree = zip(*of_each(prompts, measure))
    features, costs, agreement = (torch.cat(parts, dim=1) for parts in (x, cost, agree))
    if not bool(features.isfinite().all() and costs.isfinite().all()):
        end_all(PiKVError("the model's numbers are not finite", hint="train in --dtype float32"))
    read = torch.cat(ids)
    return Lessons(features, costs, agreement, torch.cat(kept), fingerprint(read), len(read))


def always(strategy: int) -> Choose:
    """Return the choice of one strategy in every layer of every prompt."""
    return lambda held: one_hot(strategy, held.shape[2], held.shape[1]).repeat(held.shape[0], 1, 1)


def at_random(seed: int) -> Choose:
    """Return the choice of any strategy, layer by layer and prompt by prompt, of a seed and the prompts' place."""

    def choose(held: Held) -> Tensor:
        L, B, E = held.shape
        drawn = np.random.default_rng([seed, *held.place]).integers(E, size=(L, B))
        return functional.one_hot(torch.from_numpy(drawn), E).float()

    return choose


def one_hot(strategy: int, num_strategies: int, num_rows: int) -> Tensor:
    """Return weights [B,E] that are one strategy's alone."""
    weights = torch.zeros(num_rows, num_strategies)
    weights[:, strategy] = 1
    return weights


def log_probs(model: Any, cache: PiKVCache, ids: Tensor) -> Tensor:
    """Feed tokens [B,T] and return the log-probabilities [B,T,V] of what comes after each; float32."""
    seen = cache.get_seq_length()
    place: Sequence[int] = range(seen, seen + ids.shape[1])
    position = torch.tensor(place, device=ids.device).expand(len(ids), -1)
    output = model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
    return output.logits.float().log_softmax(dim=-1)
