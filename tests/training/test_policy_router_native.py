"""Routers of mode native learn which layers deserve more: by what a strategy's own share loses, and a price for it."""

import dataclasses
import json
import tempfile
from operator import methodcaller

import numpy as np
import pytest
import torch
import transformers
from small_calibration import write
from small_models import SMALL

from pikv_core.cache import PiKVCache, calibration
from pikv_core.data.recall import Recall, RecallSource
from pikv_core.data.tokenizer import build_word_level
from pikv_core.errors import UsageError
from pikv_core.jobs import policy_router as job
from pikv_core.model.steps import feed
from pikv_core.recipes import load
from pikv_core.runs import Run
from pikv_core.scheduling.moe_router import GIVEN, WEIGHTS, MoERouter, num_features
from pikv_core.schema import PolicyRouterSettings
from pikv_core.training import policy_router, router_lessons

TASK = Recall(num_keys=16, num_values=8, num_filler=16)
SETTINGS = PolicyRouterSettings(
    mode="native", length=64, budgets=[0.5], samples=4, validation_samples=2, eval_samples=4, steps=120, noise=0.5
)
POLICY = MoERouter(mode="native")
L, HEAD_DIM, CONTEXT = 2, 16, 50


@pytest.fixture
def source():
    return RecallSource(TASK, build_word_level(TASK.words()))


@pytest.fixture
def model(source):
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": source.vocab_size, "num_hidden_layers": L}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model.eval()


@pytest.fixture
def start(model):
    return policy_router.untrained(model, POLICY, {}, 0, num_features(HEAD_DIM))


@pytest.fixture
def prompts(model, source, start):
    ids = torch.from_numpy(source.batch(np.random.default_rng(3), 2, 64, "test").ids)
    return hold(model, ids, start)


def hold(model, ids, tensors, router="base"):
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(model, f"{temporary}/c", [member(tensors, router)])
        recipe = {"policy": "moe-router", "budget": 0.5, "calibration": [folder]}
        return router_lessons.Held(
            model, recipe, router_lessons.Prompts(ids, CONTEXT, torch.zeros_like(ids, dtype=torch.bool))
        )


def member(tensors, router):
    return calibration.Member("moe-router", "policy", {"mode": "native", "router": router}, tensors)


@torch.no_grad()
def lost(model, prompts, cache):
    found = router_lessons.log_probs(model, cache, prompts.later)
    return (prompts.full.exp() * (prompts.full - found)).sum(-1).mean(-1)


def test_a_strategy_costs_in_a_layer_what_it_loses_at_its_own_share(model, prompts):
    shares = [0.3, 0.5, 0.8, 0.5, 0.5, 0.5]  # of those without one the budget
    assert prompts.kept.tolist() == shares
    cost, _ = prompts.costs(None)
    for strategy, (name, share) in enumerate(zip(POLICY.strategies, shares)):
        for index in range(L):
            cache = PiKVCache.for_model(model, {"policy": name, "budget": share})
            cache.hold()
            feed(model, cache, prompts.prompts.ids[:, :CONTEXT])
            cache.own_layers[index].compress()
            torch.testing.assert_close(cost[index, :, strategy], lost(model, prompts, cache), rtol=1e-3, atol=1e-6)


def test_the_others_of_a_cost_share_the_budget(model, prompts):
    others = torch.stack([router_lessons.one_hot(0, 6, 2), router_lessons.one_hot(2, 6, 2)])
    cache = prompts.compressed(others)
    assert [layer.num_stored for layer in cache.own_layers] == [14, 36]  # 0.3 and 0.8 of 50, which are to be 50
    cost, _ = prompts.costs(others)
    alone = prompts.compressed(others, but=1)
    assert [layer.num_stored for layer in alone.own_layers] == [14, CONTEXT]
    layer = alone.own_layers[1]
    recipe = {"policy": "aggressive", "budget": 0.3}
    own = PiKVCache.for_model(model, recipe)
    own.hold()
    feed(model, own, prompts.prompts.ids[:, :CONTEXT])
    own.own_layers[1].compress()
    keys, _, position = own.own_layers[1].retrieve()
    assert position.shape[2] == 15
    [lane] = layer.lanes
    held = lane.position()
    slots = (held[:, :, None] == position[..., None]).int().argmax(dim=-1)
    lane.tail.keep(slots)
    torch.testing.assert_close(lane.contents()[0], keys)
    torch.testing.assert_close(cost[1, :, 0], lost(model, prompts, alone), rtol=1e-3, atol=1e-6)


def test_what_is_compared_spends_the_same(prompts):
    E = prompts.shape[2]
    choices = [*(router_lessons.always(strategy) for strategy in range(E)), router_lessons.at_random(1)]
    for choose in choices:
        cache = prompts.compressed(choose(prompts))
        assert sum(int((layer.positions() >= 0).sum()) for layer in cache.own_layers) == 2 * 2 * L * 25
    single = prompts.together(choices[:E])
    assert bool((prompts.together([methodcaller("oracle")])[:, 0] <= single.amin(dim=-1) + 1e-6).all())


def planted(prompts):
    """Return lessons of real prompts in which layer 0 loses much by what it drops, layer 1 little."""
    kept = prompts.kept.float().expand(prompts.shape[1:])
    loses = torch.tensor([1.0, 0.01])[:, None, None]
    cost = loses * (1 - kept) * torch.tensor([1, 1, 1, 1.5, 1.5, 1.5])  # strategies by ends are better
    return router_lessons.Lessons(prompts.features, cost, 1 - cost.clamp(max=1), kept, "0" * 64, 1)


@pytest.mark.parametrize("router", ["base", "pikv"])
@pytest.mark.parametrize(
    ("mu", "chosen", "kept"), [(0.0, [2, 2], [25, 25]), (0.3, [2, 0], [36, 14]), (3.0, [0, 0], [25, 25])]
)
def test_a_layer_that_loses_much_is_given_more(tmp_path, model, source, router, mu, chosen, kept):
    torch.manual_seed(0)
    policy = dataclasses.replace(POLICY, router=router)
    start = policy_router.untrained(model, policy, {}, 0, num_features(HEAD_DIM))
    ids = torch.from_numpy(source.batch(np.random.default_rng(3), 48, 64, "train").ids)
    known, unseen = (hold(model, own, start, router) for own in ids.split([40, 8]))
    settings = SETTINGS.model_copy(update={"mu": mu, "steps": 300})
    run = Run(load("train", None, ["start=given", "policy_router={}"], {"out": str(tmp_path / "run")}))
    fitted = policy_router.learn(planted(known), policy, start, settings, run, best=1)
    assert policy_router.choice(policy, fitted)(unseen).argmax(dim=-1).tolist() == [[own] * 8 for own in chosen]
    folder = write(model, tmp_path / "fitted", [member(fitted, router)])
    cache = PiKVCache.for_model(model, {"policy": "moe-router", "budget": 0.5, "calibration": [folder]})
    feed(model, cache, unseen.prompts.ids[:, :CONTEXT])
    assert cache.num_stored == kept


def test_the_job_trains_for_the_mode_and_says_so(tmp_path, model, source):
    model.save_pretrained(tmp_path / "model")
    source.save(tmp_path / "model")
    given = SETTINGS.model_dump(include={"mode", "length", "budgets", "samples", "validation_samples", "eval_samples"})
    settings = [f"policy_router.{name}={value}" for name, value in given.items()]
    settings += ["policy_router.strategies=[aggressive, snapkv, conservative]", "policy_router.steps=10"]
    recipe = load("train", None, [f"start={tmp_path / 'model'}", f"out={tmp_path / 'run'}", *settings])
    result = job.run(recipe, Run(recipe))
    assert set(result.metrics) >= {"chosen", "best_single", "random", "oracle", "untrained", "single/conservative"}
    assert result.metrics["oracle"] <= result.metrics["best_single"] + 1e-6
    manifest = json.loads((tmp_path / "run" / "calibration" / "manifest.json").read_text())
    assert manifest["members"]["moe-router"]["options"]["mode"] == "native"
    recipe = {"policy": "moe-router", "budget": 0.25, "calibration": [str(tmp_path / "run")]}
    cache = PiKVCache.for_model(model, recipe)
    for layer, own in zip(cache.own_layers, torch.eye(3)[[0, 2], None]):
        layer.run.own[GIVEN] = own
    feed(model, cache, torch.arange(1, 41)[None] % source.vocab_size)
    assert cache.num_stored == [5, 15] and all(layer.run.own[WEIGHTS].shape == (1, 3) for layer in cache.own_layers)
    with pytest.raises(UsageError, match="was fitted with mode native, not budget"):
        PiKVCache.for_model(model, {**recipe, "policy": {"name": "moe-router", "mode": "budget"}})
