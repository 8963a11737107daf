"""The learned scorer: what its networks say is what stays, whatever the slot, head or length."""

import dataclasses
import math

import pytest
import torch
from scheduling.synthetic import NUM_LAYERS, World, make_tokens
from small_calibration import networks, policies, write

from pikv_core.cache import PiKVCache
from pikv_core.cache.rotary import Rotary
from pikv_core.errors import PiKVError, UsageError
from pikv_core.model.steps import prefill, step
from pikv_core.scheduling.learned_scorer import LearnedScorer, features

D = 16


@pytest.fixture
def world(small_model):
    world = World(head_dim=D)
    world.rotary, world.fitted = Rotary.of(small_model("llama")), networks(NUM_LAYERS, world.num_heads, D)
    return world


def tokens_of(world, layer=2):
    return make_tokens(world, world.layer_runs()[layer], {})


def test_the_score_is_the_networks_of_its_layer_and_head_by_hand(world):
    tokens = tokens_of(world)
    score, x = LearnedScorer().score(tokens), features(tokens)
    for head in range(world.num_heads):
        net = {name: value[2, head].double() for name, value in world.fitted.items()}
        for slot in (6, 17, 31):
            normal = (x[0, head, slot].double() - net["mean"]) * net["scale"]
            inner = normal @ net["into"] + net["bias"]
            hidden = [0.5 * v * (1 + math.erf(v / 2**0.5)) for v in inner.tolist()]
            expected = sum(h * o for h, o in zip(hidden, net["out"].tolist())) + float(net["level"])
            assert float(score[0, head, slot]) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_features_are_those_of_the_key_before_its_rotation(world):
    tokens = tokens_of(world)
    x, run = features(tokens), tokens.layer
    back = run.rotary.rotate(x[..., :D], tokens.position.clamp(min=0), run.index)
    torch.testing.assert_close(back[0], tokens.keys()[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(x[..., D : 2 * D], tokens.values())
    newest = tokens.position[0, 0].argmax()
    assert x[0, 0, newest, -1] == 0 and float(x[0, 0, 0, -1]) == pytest.approx(math.log(32))
    keys = tokens.keys()[0, 0].double()
    unit = keys / keys.norm(dim=-1, keepdim=True)
    mean = unit.mean(0)
    torch.testing.assert_close(x[0, 0, :, -2].double(), unit @ mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_long_prompts_are_scored_in_parts_alike(world, monkeypatch):
    whole = LearnedScorer().score(tokens_of(world))
    monkeypatch.setattr("pikv_core.scheduling.learned_scorer.TOKENS_AT_A_TIME", 5)
    torch.testing.assert_close(LearnedScorer().score(tokens_of(world)), whole)


def test_networks_of_another_shape_and_a_missing_rotation_are_told(world):
    tokens = tokens_of(world)
    fewer = {name: x[:2] for name, x in world.fitted.items()}
    with pytest.raises(PiKVError, match="networks for layers"):
        LearnedScorer().score(dataclasses.replace(tokens, layer=dataclasses.replace(tokens.layer, fitted=fewer)))
    with pytest.raises(PiKVError, match="'learned-scorer' needs the rotary embedding"):
        LearnedScorer().score(dataclasses.replace(tokens, layer=dataclasses.replace(tokens.layer, rotary=None)))


@pytest.mark.parametrize(("budget", "codec", "allocation"), [(16, "none", "uniform"), (80, "int8", "ada-kv")])
def test_a_cache_keeps_the_highest_scores_within_its_budget(small_model, tmp_path, budget, codec, allocation):
    model = small_model("llama")
    folder = write(model, tmp_path / "fitted", policies(model))
    recipe = {"policy": "learned-scorer", "calibration": [folder]}
    ids = torch.randint(1, 97, (2, 192), generator=torch.Generator().manual_seed(3))
    whole = PiKVCache.for_model(model, {**recipe, "budget": 192})
    prefill(model, whole, ids)
    cache = PiKVCache.for_model(model, {**recipe, "budget": budget, "codec": codec, "allocation": allocation})
    prefill(model, cache, ids)
    for layer, full in zip(cache.own_layers, whole.own_layers):
        held = layer.positions()
        assert (held >= 0).sum() <= budget * 4 + 2 * 64 * (codec != "none")
        if codec == "none":
            [lane] = full.lanes
            own = dataclasses.replace(full.run, fitted=layer.run.fitted, rotary=layer.run.rotary)
            place = torch.tensor([192, 192]), torch.full((2, 2), budget), lane.head, lane.row
            keys, values, position = lane.contents()
            tokens = tokens_from(position, place, keys, values, own)
            best = LearnedScorer().score(tokens).topk(budget, dim=-1).indices
            assert torch.equal(held.sort(dim=-1).values, best.sort(dim=-1).values.to(held.dtype))
    before = cache.own_layers[0].positions()
    step(model, cache, ids[:, 0])
    assert cache.own_layers[0].positions().shape[-1] <= before.shape[-1] + 1


def tokens_from(position, place, keys, values, run):
    from pikv_core.scheduling.base import Tokens

    return Tokens(position, {}, *place, lambda: keys, lambda: values, run)


def test_without_networks_the_recipe_that_fits_them_is_named(small_model):
    with pytest.raises(UsageError, match="only with a calibration") as caught:
        PiKVCache.for_model(small_model("llama"), {"policy": "learned-scorer", "budget": 8})
    assert "token-scorer.yaml" in caught.value.hint
