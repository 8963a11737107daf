"""The router's choice is what stays: one strategy's tokens, or the mean of several strategies' ranks."""

import dataclasses

import pytest
import torch
from scheduling.synthetic import NUM_LAYERS, World, make_tokens, show
from small_calibration import networks, policies, routers, write

from pikv_core.cache import PiKVCache
from pikv_core.cache.rotary import Rotary
from pikv_core.components import Component, build
from pikv_core.errors import PiKVError, UsageError
from pikv_core.model.steps import feed
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.moe_router import GIVEN, WEIGHTS, MoERouter, features, ranks

BUDGET = 24
IDS = torch.randint(1, 97, (2, 90), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def folder(small_model, tmp_path):
    model = small_model("llama")
    return write(model, tmp_path / "fitted", policies(model))


@pytest.fixture
def world(small_model):
    world = World(head_dim=16)
    world.rotary, world.fitted = Rotary.of(small_model("llama")), routers(NUM_LAYERS, 16)
    return world


def seen(policy, world, **fitted):
    run = world.layer_runs()[1]
    run = dataclasses.replace(run, fitted={**world.fitted, **fitted})
    return make_tokens(world, run, show(policy, world, run))


def one_hot(strategy, num_rows=2):
    return torch.nn.functional.one_hot(torch.tensor([strategy] * num_rows), 6).float()


@pytest.mark.parametrize("strategy", range(6))
def test_one_strategy_alone_keeps_what_its_policy_keeps(small_model, folder, strategy):
    model, name = small_model("llama"), MoERouter().strategies[strategy]
    routed = PiKVCache.for_model(model, {"policy": "moe-router", "budget": BUDGET, "calibration": [folder]})
    for layer in routed.own_layers:
        layer.run.own[GIVEN] = one_hot(strategy)
    alone = PiKVCache.for_model(model, {"policy": name, "budget": BUDGET})
    is_token = torch.arange(90) >= torch.tensor([[0], [13]])
    for cache in (routed, alone):
        feed(model, cache, IDS, is_token)
    for one, two in zip(routed.positions, alone.positions):
        assert one.shape[-1] == BUDGET and torch.equal(one.sort(dim=-1).values, two.sort(dim=-1).values)


def test_the_weights_are_the_routers_of_the_layer_and_are_told(world):
    policy = build(POLICIES, Component("moe-router", {"top_k": 2}))
    tokens = seen(policy, world)
    policy.score(tokens)
    x, net = features(tokens).double(), {name: value[1].double() for name, value in world.fitted.items()}
    normal = (x - net["feature_mean"]) * net["feature_scale"]
    normal[:, -1] = 1
    chosen = (normal @ net["router/weight"].T).softmax(-1).topk(2)
    weights = tokens.layer.own[WEIGHTS]
    torch.testing.assert_close(weights.gather(1, chosen.indices).double(), chosen.values / chosen.values.sum(1, True))
    assert weights.count_nonzero() == 4 and torch.allclose(weights.sum(1), torch.ones(2))


def test_several_strategies_are_the_mean_of_their_ranks(world):
    policy = MoERouter()
    tokens = seen(policy, world)
    tokens.layer.own[GIVEN] = weights = torch.tensor([[0.25, 0, 0, 0, 0.75, 0], [0, 0, 0.5, 0.5, 0, 0]])
    score = policy.score(tokens)
    for row, pad in enumerate(world.padding):
        expected = torch.zeros(2, world.shape[3] - pad)
        for weight, name in zip(weights[row].tolist(), policy.strategies):
            own = policy.member_score(name, tokens)[row, :, pad:]
            order = own.argsort(dim=-1, stable=True).argsort(dim=-1).float()
            expected += weight * order / order.shape[-1]
        torch.testing.assert_close(score[row, :, pad:], expected)


def test_ranks_leave_empty_slots_behind():
    score = torch.tensor([[[5.0, 1.0, float("inf"), 1.0]]])
    position = torch.tensor([[[2, 1, -1, 0]]])
    assert ranks(score, position)[0, 0].tolist() == pytest.approx([2 / 3, 1 / 3, -1 / 3, 0])


def test_what_the_scale_leaves_out_changes_nothing(world):
    policy = MoERouter()
    scale = torch.zeros_like(world.fitted["feature_scale"])
    scale[:, 3] = 1.0
    weights = []
    for other in (False, True):
        tokens = seen(policy, world, feature_scale=scale)
        if other:
            values = tokens.values() * 7
            tokens = dataclasses.replace(tokens, values=lambda: values, capacity=tokens.capacity // 2)  # noqa: B023
        weights.append(policy.choose(tokens))
    assert torch.equal(*weights)


def test_a_strategy_that_is_calibrated_has_what_it_learnt(world):
    policy = build(POLICIES, Component("moe-router", {"strategies": ("snapkv", "learned-scorer")}))
    learnt = networks(NUM_LAYERS, world.num_heads, 16)
    tokens = seen(policy, world, **{f"learned-scorer/{name}": x for name, x in learnt.items()})
    alone = dataclasses.replace(tokens, layer=dataclasses.replace(tokens.layer, fitted=learnt))
    expected = build(POLICIES, Component("learned-scorer")).score(alone)
    assert torch.equal(policy.member_score("learned-scorer", tokens), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategies": ("snapkv",)}, "two different strategies"),
        ({"strategies": ("snapkv", "snapkv")}, "two different strategies"),
        ({"strategies": ("snapkv", "semantic"), "top_k": 3}, "top_k 3"),
        ({"strategies": ("snapkv", "kvzip")}, "'kvzip' has to be shown more"),
        ({"strategies": ("snapkv", "quest")}, "'quest' drops no tokens"),
        ({"strategies": ("snapkv", "expected-attention")}, "'expected-attention' learns from queries"),
        ({"strategies": ("snapkv", "fastv")}, "'fastv' has budgets of its own"),
        ({"strategies": ("snapkv", "moe-router")}, "chooses among policies itself"),
    ],
)
def test_strategies_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(POLICIES, Component("moe-router", options))
    assert caught.value.hint


def test_a_second_prompt_keeps_the_choice_where_heads_are_stored_apart(small_model, folder):
    model = small_model("llama")
    recipe = {"policy": "moe-router", "budget": BUDGET, "allocation": "ada-kv", "calibration": [folder]}
    ids = torch.randint(1, 97, (3, 150), generator=torch.Generator().manual_seed(6))

    def fed(rows):
        cache, chosen = PiKVCache.for_model(model, recipe), []
        with torch.no_grad():
            for part in rows.split([90, 60], dim=1):
                feed(model, cache, part)
                chosen.append([layer.run.own[WEIGHTS] for layer in cache.own_layers])
        assert all(torch.equal(*pair) for pair in zip(*chosen))
        return cache

    together = fed(ids)
    assert any(len(layer.lanes) > 1 for layer in together.own_layers)
    for row in range(3):
        alone = fed(ids[row : row + 1])
        for ours, own in zip(together.positions, alone.positions):
            kept = [[sorted(p for p in head.tolist() if p >= 0) for head in x] for x in (ours[row], own[0])]
            assert kept[0] == kept[1]


@pytest.mark.parametrize("sizes", [{"head_dim": 8}, {"num_strategies": 3}, {"cache_aware": True}], ids=str)
def test_routers_of_another_shape_are_told(world, sizes):
    with pytest.raises(PiKVError, match="routers for layers, strategies and features") as caught:
        MoERouter().score(seen(MoERouter(), world, **routers(NUM_LAYERS, **{"head_dim": 16} | sizes)))
    assert caught.value.hint


def test_without_routers_the_recipe_that_trains_them_is_named(small_model):
    with pytest.raises(UsageError, match="only with a calibration") as caught:
        PiKVCache.for_model(small_model("llama"), {"policy": "moe-router", "budget": 8})
    assert "policy-router.yaml" in caught.value.hint
