"""Hit rates are what the newest queries would still find; routers may look at them, and at what came of it before."""

import dataclasses

import pytest
import torch
from scheduling.synthetic import NUM_LAYERS, World, make_tokens, show
from small_calibration import routers, write

from pikv_core.cache import PiKVCache, calibration
from pikv_core.cache.rotary import Rotary
from pikv_core.components import Component, build
from pikv_core.errors import PiKVError
from pikv_core.model.steps import feed
from pikv_core.scheduling import POLICIES, strategy_history
from pikv_core.scheduling.hit_rates import hit_rates
from pikv_core.scheduling.moe_router import GIVEN, MASS, WEIGHTS, WINDOW, MoERouter, features

E = 6
IDS = torch.randint(1, 97, (2, 90), generator=torch.Generator().manual_seed(5))
IS_TOKEN = torch.arange(90) >= torch.tensor([[0], [13]])


@pytest.fixture
def world(small_model):
    world = World(head_dim=16)
    world.rotary, world.fitted = Rotary.of(small_model("llama")), routers(NUM_LAYERS, 16, cache_aware=True)
    return world


def aware(**options):
    return build(POLICIES, Component("moe-router", {"cache_aware": True, **options}))


def seen(policy, world, capacity=8, **fitted):
    run = world.layer_runs()[1]
    run = dataclasses.replace(run, fitted={**world.fitted, **fitted})
    return make_tokens(world, run, show(policy, world, run), capacity)


def by_hand(mass, score, position, capacity):
    """Return one head's rate: order by score, newer first on ties, and add up."""
    tokens = [(s, p, m) for s, p, m in zip(score.tolist(), position.tolist(), mass.tolist()) if p >= 0]
    tokens.sort(key=lambda token: token[:2], reverse=True)
    return sum(m for _, _, m in tokens[:capacity]) / sum(m for _, _, m in tokens)


@pytest.mark.parametrize("values", [3, 1000])  # of the scores: many ties, few
def test_hit_rates_are_shares_of_the_attention_on_what_stays(values):
    generator = torch.Generator().manual_seed(values)
    B, G, S = 3, 2, 17
    mass = torch.rand(B, G, S, generator=generator)
    scores = [torch.randint(values, (B, G, S), generator=generator).float() for _ in range(4)]
    scores[1][:, :, 3] = torch.inf
    scores[2][:, :, 5:9] = -torch.inf
    position = torch.stack([torch.randperm(S, generator=generator) for _ in range(B * G)]).view(B, G, S) - 2
    position = position.clamp(min=-1).to(torch.int32)
    capacity = torch.randint(1, S - 2, (B, G), generator=generator)
    found = hit_rates(mass, iter(scores), position, capacity)
    assert found.shape == (B, G, 4)
    for b in range(B):
        for g in range(G):
            for e, score in enumerate(scores):
                expected = by_hand(mass[b, g], score[b, g], position[b, g], int(capacity[b, g]))
                assert float(found[b, g, e]) == pytest.approx(expected, abs=1e-6)
    whole = hit_rates(mass, scores, position, torch.full((B, G), S - 2))
    assert bool((whole == 1).all()) and bool((found <= 1).all())
    assert bool((hit_rates(mass.masked_fill(position >= 0, 0.0), scores, position, capacity) == 0).all())


def test_a_router_is_told_what_every_strategy_would_hit(world):
    policy = aware()
    tokens = seen(policy, world)
    x = policy.look(tokens)
    assert x.shape == (2, policy.width(16)) and torch.equal(x[:, :-13], features(tokens)[:, :-1])
    log_seen, rates = policy.measured(x)
    torch.testing.assert_close(log_seen, tokens.num_seen.float().log())
    S = world.shape[3]
    newest = world.attention[:, :, :, S - 1 :]  # its last step is one token
    assert WINDOW > 1
    for row, pad in enumerate(world.padding):
        for strategy, name in enumerate(policy.strategies):
            score = policy.member_score(name, tokens)
            heads = [
                by_hand(newest[row, g, :, 0, pad:].mean(0), score[row, g, pad:], tokens.position[row, g, pad:], 8)
                for g in range(2)
            ]
            assert float(rates[row, strategy]) == pytest.approx(sum(heads) / 2, abs=1e-5)


def test_hit_rates_are_those_of_what_the_cache_then_keeps(small_model, tmp_path):
    model = small_model("llama")
    fitted = routers(3, 16, cache_aware=True)
    folder = write(model, tmp_path / "c", [calibration.Member("moe-router", "policy", {"cache_aware": True}, fitted)])
    recipe = {"policy": "moe-router", "budget": 24, "calibration": [folder]}
    held = PiKVCache.for_model(model, recipe)
    held.hold()
    feed(model, held, IDS, IS_TOKEN)
    policy, before = held.own_layers[0].policy, held.fork()
    mass = [layer.lanes[0].tail.columns()[MASS].clone() for layer in before.own_layers]
    position = [layer.lanes[0].position().clone() for layer in before.own_layers]
    told = []
    look = MoERouter.look

    def listening(self, tokens, score_of=None):
        told.append(look(self, tokens, score_of))
        return told[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoERouter, "look", listening)
        for layer in held.fork().own_layers:
            layer.compress()
    for index, x in enumerate(told):
        rates = policy.measured(x)[1]
        for strategy in range(E):
            cache = before.fork()
            layer = cache.own_layers[index]
            layer.run.own[GIVEN] = torch.nn.functional.one_hot(torch.tensor([strategy] * 2), E).float()
            layer.compress()
            is_kept = (position[index][..., None] == cache.positions[index][:, :, None]).any(-1) & (
                position[index] >= 0
            )
            real = mass[index].masked_fill(position[index] < 0, 0.0)
            expected = (real * is_kept).sum(-1) / real.sum(-1)
            torch.testing.assert_close(rates[:, strategy], expected.mean(dim=1))
    assert len(told) == 3 and all(bool((policy.measured(x)[1] < 1).any()) for x in told)


def test_under_a_budget_of_everything_all_is_hit(world):
    policy = aware()
    S = world.shape[3]
    assert bool((policy.measured(policy.look(seen(policy, world, capacity=S)))[1] == 1).all())


def test_routers_to_whom_the_cache_says_nothing_choose_as_without_it(world):
    policy, plain = aware(), MoERouter()
    fitted = dict(world.fitted)
    F = fitted["feature_mean"].shape[-1]
    others = [*range(F - 1 - 2 * E), F - 1]
    narrow = {name: fitted[name][..., others] for name in ("feature_mean", "feature_scale", "router/weight")}
    deaf = torch.zeros_like(fitted["router/weight"])
    deaf[..., others] = narrow["router/weight"]
    flat = torch.zeros_like(fitted["feature_scale"])
    flat[..., others] = narrow["feature_scale"]
    expected = plain.choose(seen(plain, world, **narrow))
    assert torch.equal(policy.choose(seen(policy, world, **{"router/weight": deaf})), expected)
    assert torch.equal(policy.choose(seen(policy, world, feature_scale=flat)), expected)
    scores = [one.score(seen(one, world, **own)) for one, own in ((plain, narrow), (policy, {"router/weight": deaf}))]
    assert torch.equal(*scores)


def test_a_router_takes_what_hits_most_or_cost_least_where_its_weights_say_so(world):
    policy = aware()
    F = world.fitted["feature_mean"].shape[-1]
    zeros, ones = torch.zeros(NUM_LAYERS, F), torch.ones(NUM_LAYERS, F)
    tokens = seen(policy, world)
    log_seen, rates = policy.measured(policy.look(tokens))
    said = strategy_history.read(world.fitted[strategy_history.COST][1], log_seen, rates)
    assert len(said.unique()) == said.numel()
    for first, sign, expected in ((F - 1 - 2 * E, 1, rates.argmax(1)), (F - 1 - E, -1, said.argmin(1))):
        weight = torch.zeros(NUM_LAYERS, E, F)
        weight[:, torch.arange(E), first + torch.arange(E)] = sign
        fitted = {"feature_mean": zeros, "feature_scale": ones, "router/weight": weight}
        weights = policy.choose(seen(policy, world, **fitted))
        assert weights.argmax(dim=1).tolist() == expected.tolist()


def test_no_strategy_scores_twice(world, monkeypatch):
    asked = []
    score = MoERouter.member_score
    monkeypatch.setattr(MoERouter, "member_score", lambda self, name, _: asked.append(name) or score(self, name, _))
    policy = aware(top_k=2)
    policy.score(seen(policy, world))
    assert sorted(asked) == sorted(policy.strategies)
    asked.clear()
    plain = MoERouter()
    tokens = seen(plain, world, **routers(NUM_LAYERS, 16))
    plain.score(tokens)
    assert asked == [name for e, name in enumerate(plain.strategies) if tokens.layer.own[WEIGHTS][:, e].any()]


def test_routers_that_were_trained_without_hit_rates_are_told_apart(world):
    policy = aware()
    with pytest.raises(PiKVError, match="routers for layers, strategies and features"):
        policy.choose(seen(policy, world, **routers(NUM_LAYERS, 16)))
