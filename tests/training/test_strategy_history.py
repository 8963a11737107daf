"""What strategies cost where is remembered, goes on from one calibration to the next, and says whose turn it is."""

import dataclasses
import itertools
import math

import pytest
import torch
import transformers
from small_calibration import routers, write
from small_models import SMALL

from pikv_core.cache import PiKVCache, calibration
from pikv_core.components import Component
from pikv_core.data.recall import Recall, RecallSource
from pikv_core.data.tokenizer import build_word_level
from pikv_core.errors import UsageError
from pikv_core.jobs import policy_router as job
from pikv_core.model.steps import feed
from pikv_core.recipes import load
from pikv_core.runs import Run
from pikv_core.scheduling import strategy_history
from pikv_core.scheduling.moe_router import ROUTER, WEIGHTS, MoERouter
from pikv_core.scheduling.strategy_history import COST, COUNT, DECAY, NUM_LENGTHS, RATE_EDGES
from pikv_core.schema import PolicyRouterSettings
from pikv_core.training import policy_router
from pikv_core.training.router_lessons import Held, Lessons, Prompts
from pikv_core.training.useful_strategies import LEAST_GAIN, most_useful, of_strategies

L, E, HEAD_DIM = 2, 6, 8
STEPS = PolicyRouterSettings(steps=150, noise=0.5)


def lessons_of(features, cost):
    return Lessons(
        features, cost, (1 - cost).clamp(min=0, max=1), torch.full(cost.shape[1:], 0.5), "0" * 64, cost.shape[1]
    )


def drawn(policy, seed, num=200):
    """Return lessons of random features, of prompts of 16 to 4,096 tokens; costs 0.9 to 1.1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, num, policy.width(HEAD_DIM), generator=generator)
    E = len(policy.strategies)
    if policy.cache_aware:
        x[..., -2 * E - 3] = torch.randint(16, 4097, (num,), generator=generator).float().log()
        x[..., -2 * E - 1 : -E - 1] = torch.rand(L, num, E, generator=generator)
        x[..., -E - 1 : -1] = 0
    x[..., -1] = 1
    return lessons_of(x, 0.9 + 0.2 * torch.rand(L, num, E, generator=generator))


def started(policy):
    state = policy_router.new_router(policy.router, policy.width(HEAD_DIM), len(policy.strategies), 1).state_dict()
    F = policy.width(HEAD_DIM)
    start = {f"{ROUTER}{name}": torch.stack([value] * L) for name, value in state.items()}
    start |= {"feature_mean": torch.zeros(L, F), "feature_scale": torch.ones(L, F)}
    return {**start, **(strategy_history.empty(L, len(policy.strategies)) if policy.cache_aware else {})}


def run_in(folder):
    return Run(load("train", None, ["start=given", "policy_router={}"], {"out": str(folder)}))


def chosen(policy, fitted, lessons):
    """Return which strategy [L,N] the routers take."""

    class Shown:
        features, shape = lessons.features, tuple(lessons.cost.shape)

    return policy_router.choice(policy, fitted)(Shown).argmax(dim=-1)


def learn(lessons, policy, start, settings, run):
    """Train to improve on the strategy that costs least over all."""
    best = int(lessons.cost.mean(dim=(0, 1)).argmin())
    return policy_router.learn(lessons, policy, start, settings, run, best)


def test_the_table_is_a_running_mean_and_is_read_before_it_is_written():
    generator = torch.Generator().manual_seed(0)
    N = 300
    seen = torch.randint(1, 40, (L, N), generator=generator)
    seen[:, :6] = torch.tensor([1, 4, 1023, 1024, 2**23, 2**26])
    rates = torch.rand(L, N, E, generator=generator).where(torch.rand(L, N, E, generator=generator) < 0.8, 1.0)
    rates[:, 3:6, 0] = torch.tensor(RATE_EDGES)
    cost = torch.randn(L, N, E, generator=generator)
    before, table = strategy_history.observe(strategy_history.empty(L, E), seen.float().log(), rates, cost)
    cells = {}
    for n in range(N):
        for layer, e in itertools.product(range(L), range(E)):
            length = min(int(math.log2(int(seen[layer, n]))), NUM_LENGTHS - 1)
            rate = sum(float(rates[layer, n, e]) >= edge for edge in torch.tensor(RATE_EDGES).tolist())
            known = cells.setdefault((layer, length, rate, e), [])
            weights = [DECAY**age for age in range(len(known))][::-1]
            mean = sum(w * x for w, x in zip(weights, known)) / sum(weights) if known else 0.0
            assert float(before[layer, n, e]) == pytest.approx(mean, abs=1e-5)
            known.append(float(cost[layer, n, e]))
    assert max(map(len, cells.values())) > 20
    for cell in itertools.product(*map(range, table[COST].shape)):
        known = cells.get(cell, [])
        weights = [DECAY**age for age in range(len(known))][::-1]
        assert float(table[COUNT][cell]) == pytest.approx(sum(weights), abs=1e-4)
        expected = sum(w * x for w, x in zip(weights, known)) / sum(weights) if known else 0.0
        assert float(table[COST][cell]) == pytest.approx(expected, abs=1e-5)
    log_seen = seen.float().log()
    again, _ = strategy_history.observe(table, log_seen[:, :1], rates[:, :1], cost[:, :1])
    for layer in range(L):
        read = strategy_history.read(table[COST][layer], log_seen[layer], rates[layer])
        assert read.shape == (N, E) and torch.equal(read[0], again[layer, 0])


def test_relative_costs_are_around_nothing():
    cost = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    assert strategy_history.relative(cost, 1e-6)[0].tolist() == pytest.approx([-0.5, 0, 0.5], abs=1e-5)
    assert strategy_history.relative(cost, 1e-6)[1].tolist() == [0, 0, 0]


def test_a_table_that_goes_on_is_one_table_of_all_lessons_in_order(tmp_path):
    policy = MoERouter(cache_aware=True)
    first, second = drawn(policy, 1), drawn(policy, 2)
    both = lessons_of(*(torch.cat([getattr(x, name) for x in (first, second)], dim=1) for name in ("features", "cost")))
    run, settings = run_in(tmp_path), STEPS.model_copy(update={"steps": 1})
    start = started(policy)
    one = learn(both, policy, start, settings, run)
    earlier = learn(first, policy, start, settings, run)
    two = learn(second, policy, {**start, **{name: earlier[name] for name in (COST, COUNT)}}, settings, run)
    assert all(torch.equal(one[name], two[name]) and bool(one[name].any()) for name in (COST, COUNT))
    assert not start[COUNT].any()


def with_rule(policy, seed):
    """Return lessons in which the strategy of the highest hit rate, ahead by a fifth, costs a tenth of the others."""
    lessons = drawn(policy, seed, 512)
    rates = policy.measured(lessons.features)[1]
    best = rates.argmax(dim=-1, keepdim=True)
    rates.mul_(0.8).scatter_add_(-1, best, torch.full(best.shape, 0.2))
    return lessons_of(lessons.features, lessons.cost.scatter(-1, best, 0.1)), best[..., 0]


def test_that_the_highest_hit_rate_is_best_is_learnt_by_routers_that_see_it(tmp_path):
    aware, plain = MoERouter(cache_aware=True), MoERouter()
    lessons, unseen = (with_rule(aware, seed) for seed in (1, 2))
    shares = {}
    for policy in (aware, plain):
        of, new = (
            x if policy is aware else dataclasses.replace(x, features=x.features[..., [*range(2 * HEAD_DIM + 10), -1]])
            for x in (lessons[0], unseen[0])
        )
        fitted = learn(of, policy, started(policy), STEPS, run_in(tmp_path / str(policy.cache_aware)))
        shares[policy] = float((chosen(policy, fitted, new) == unseen[1]).float().mean())
    assert shares[aware] > 0.95
    assert shares[plain] < 0.4


def test_what_did_well_before_is_taken_again_where_hit_rates_do_not_tell_strategies_apart(tmp_path):
    policy = MoERouter(cache_aware=True)

    def told(seed, best_of):
        """Long prompts are one strategy's, short ones another's; what they look like says nothing."""
        lessons = drawn(policy, seed, 512)
        x = lessons.features
        x[..., :-13] = 0
        x[..., -15], x[..., -14], x[..., -13:-7] = 0, 0, 0.7
        bucket = torch.randint(5, 12, (512,), generator=torch.Generator().manual_seed(seed))
        x[..., -15] = (1.5 * 2.0**bucket).log()
        best = torch.tensor(best_of)[bucket - 5].expand(L, -1)
        return lessons_of(x, lessons.cost.scatter(-1, best[..., None], 0.1)), best

    # no order in it, so that no line over the length says whose turn it is
    best_of = [0, 3, 1, 4, 0, 5, 2]
    lessons, _ = told(1, best_of)
    fitted = learn(lessons, policy, started(policy), STEPS, run_in(tmp_path))
    unseen, best = told(2, best_of)
    assert float((chosen(policy, fitted, unseen) == best).float().mean()) > 0.95
    forgotten = {**fitted, COST: torch.zeros_like(fitted[COST])}
    assert float((chosen(policy, forgotten, unseen) == best).float().mean()) < 0.6


def test_features_that_never_vary_get_no_scale_and_change_nothing(tmp_path):
    policy = MoERouter(cache_aware=True)
    lessons = drawn(policy, 3)
    lessons.features[..., -2 * E - 1 : -E - 1] = 0.25
    lessons = lessons_of(lessons.features, torch.ones_like(lessons.cost))  # and no history
    fitted = learn(lessons, policy, started(policy), STEPS, run_in(tmp_path))
    assert not fitted["feature_scale"][:, -2 * E - 1 : -1].any() and fitted["feature_scale"][:, : -2 * E - 1].all()
    other = lessons.features.clone()
    other[..., -2 * E - 1 : -E - 1] = torch.rand(*other.shape[:2], E, generator=torch.Generator().manual_seed(4))
    fitted[COST].fill_(5.0)
    assert torch.equal(*(chosen(policy, fitted, lessons_of(x, lessons.cost)) for x in (lessons.features, other)))


@pytest.mark.parametrize("seed", range(4))
def test_the_most_useful_strategies_are_taken_one_after_the_other(seed):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(L, 20, E, generator=generator) ** 3
    first = seed % E
    for num in range(2, E + 1):
        kept = most_useful(cost, num, first)
        assert kept == sorted(set(kept)) and len(kept) == num and first in kept
        if num > 2:
            before = most_useful(cost, num - 1, first)
            assert set(before) < set(kept)
        else:
            before = [first]
        means = {e: float(cost[..., [*before, e]].amin(-1).mean()) for e in range(E) if e not in before}
        assert set(kept) - set(before) == {min(means, key=means.__getitem__)}
        best = min(
            float(cost[..., list(some)].amin(-1).mean())
            for some in itertools.combinations(range(E), num)
            if first in some
        )
        assert float(cost[..., kept].amin(-1).mean()) >= best - 1e-7
    assert most_useful(cost, E, first) == list(range(E))


def test_auto_stops_where_one_more_strategy_hardly_helps():
    generator = torch.Generator().manual_seed(7)
    cost = 1 + 0.001 * torch.rand(L, 60, E, generator=generator)
    for e in (1, 4, 5):  # each far ahead on lessons of its own
        cost[:, e::6, e] = 0.2
    assert most_useful(cost, "auto", 1) == [1, 4, 5]
    assert most_useful(torch.ones(L, 5, E), "auto", 3) == [0, 3] and most_useful(torch.zeros(L, 5, E), "auto", 0) == [
        0,
        1,
    ]
    generous = torch.rand(L, 60, E, generator=generator)
    kept = most_useful(generous, "auto", 2)
    for num in range(3, len(kept) + 1):
        means = [float(generous[..., most_useful(generous, n, 2)].amin(-1).mean()) for n in (num - 1, num)]
        assert means[0] - means[1] > LEAST_GAIN * means[0]
    assert len(kept) > 2


def test_lessons_of_some_strategies_are_those_of_a_router_over_them():
    policy = MoERouter(cache_aware=True)
    lessons, kept = drawn(policy, 5), [1, 3, 4]
    some, other = of_strategies(lessons, policy, kept)
    assert other.strategies == ("moderate", "snapkv", "semantic") and other.cache_aware
    assert some.features.shape[-1] == other.width(HEAD_DIM)
    for one, two, of in zip(other.measured(some.features), policy.measured(lessons.features), (..., (..., kept))):
        assert torch.equal(one, two[of])
    assert torch.equal(some.features[..., -1], lessons.features[..., -1])
    assert torch.equal(some.features[..., : 2 * HEAD_DIM], lessons.features[..., : 2 * HEAD_DIM])
    assert torch.equal(some.cost, lessons.cost[..., kept]) and torch.equal(some.kept, lessons.kept[..., kept])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a small model's folder and what trains its routers, with settings."""
    folder = tmp_path_factory.mktemp("small")
    task = Recall(num_keys=16, num_values=8, num_filler=16)
    source = RecallSource(task, build_word_level(task.words()))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "vocab_size": source.vocab_size}))
    model.eval().save_pretrained(folder / "model")
    source.save(folder / "model")
    sizes = {"length": 64, "budgets": [0.4], "samples": 4, "validation_samples": 2, "eval_samples": 2, "steps": 5}
    given = [f"start={folder / 'model'}", *(f"policy_router.{name}={value}" for name, value in sizes.items())]

    def train(name, *settings):
        asked = [*given, f"out={folder / name}", *(f"policy_router.{one}" for one in settings)]
        recipe = load("train", None, asked)
        return job.run(recipe, Run(recipe))

    return model, train


def test_a_history_is_saved_with_the_routers_and_goes_on(trained):
    model, train = trained
    names = ["strategies=[snapkv, semantic, aggressive]", "cache_aware=true", "rounds=1"]
    first = train("first", *names)
    options, saved = calibration.fitted([first.calibration], "policy", Component("moe-router"), model.config)
    assert options.options["cache_aware"] is True
    assert saved[COST].shape == (len(model.model.layers), NUM_LENGTHS, len(RATE_EDGES) + 1, 3)
    torch.testing.assert_close(saved[COUNT].sum(dim=(1, 2)), torch.full((3, 3), 4.0), atol=0.1, rtol=0)
    assert set(saved[COUNT].nonzero()[:, 1].tolist()) == {5}  # 32 to 63 tokens
    second = train("second", *names, f"calibration=[{first.calibration}]")
    _, more = calibration.fitted([second.calibration], "policy", Component("moe-router"), model.config)
    assert bool((more[COUNT].sum(dim=(1, 2)) > 7.5).all())
    torch.testing.assert_close(more[COST], saved[COST])  # the same prompts again

    cache = PiKVCache.for_model(model, {"policy": "moe-router", "budget": 0.25, "calibration": [second.calibration]})
    with torch.no_grad():
        feed(model, cache, torch.arange(1, 41)[None] % model.config.vocab_size)
    assert cache.num_stored == [10] * len(cache.own_layers)
    assert all(layer.run.own[WEIGHTS].shape == (1, 3) for layer in cache.own_layers)
    some = train("some", *names, "num_strategies=2", f"calibration=[{first.calibration}]")
    _, fewer = calibration.fitted([some.calibration], "policy", Component("moe-router"), model.config)
    assert fewer[COUNT].shape[-1] == 2 and bool((fewer[COUNT].sum(dim=(1, 2)) > 7.5).all())
    with pytest.raises(UsageError, match="fitted with strategies") as caught:
        train("third", "strategies=[snapkv, temporal]", "cache_aware=true", f"calibration=[{first.calibration}]")
    assert caught.value.hint


def test_lessons_see_what_a_cache_of_the_same_prompt_is_told(trained, tmp_path):
    model, _ = trained
    fitted = routers(len(model.model.layers), model.config.head_dim, cache_aware=True)
    fitted["router/weight"] *= 0.05  # so that no strategy is sure
    options = {"cache_aware": True}
    saved = write(model, tmp_path / "c", [calibration.Member("moe-router", "policy", options, fitted)])
    recipe = {"policy": {"name": "moe-router", "top_k": 3}, "calibration": [saved], "budget": 0.4}
    ids = torch.randint(1, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    held = Held(model, recipe, Prompts(ids, 50, torch.zeros_like(ids, dtype=torch.bool)))
    assert bool((held.policy.measured(held.features)[1] < 1).all())
    cache = PiKVCache.for_model(model, recipe)
    with torch.no_grad():
        feed(model, cache, ids[:, :50])
    expected = policy_router.choice(held.policy, fitted)(held)
    torch.testing.assert_close(torch.stack([layer.run.own[WEIGHTS] for layer in cache.own_layers]), expected)
    assert bool((expected.amax(dim=-1) < 0.9).all())  # so that the weights tell features apart


def test_no_more_strategies_are_saved_than_are_kept(trained):
    model, train = trained
    result = train("three", "num_strategies=3", "cache_aware=true", "rounds=2")
    assert len(result.strategies) == 3 and all(len(shares) == 3 for shares in result.usage)
    component, saved = calibration.fitted([result.calibration], "policy", Component("moe-router"), model.config)
    assert component.options["strategies"] == result.strategies
    policy = MoERouter(strategies=tuple(result.strategies), cache_aware=True)
    assert saved[f"{ROUTER}weight"].shape == (len(model.model.layers), 3, policy.width(model.config.head_dim))
    assert saved[COST].shape[-1] == 3
    assert {name for name in result.metrics if name.startswith("single/")} == {f"single/{x}" for x in result.strategies}
    auto = train("auto", "num_strategies=auto", "rounds=1")
    assert 2 <= len(auto.strategies) <= 6
    _, plain = calibration.fitted([auto.calibration], "policy", Component("moe-router"), model.config)
    assert COST not in plain
    with pytest.raises(UsageError, match="trained without cache_aware"):
        names = f"strategies=[{', '.join(auto.strategies)}]"
        train("none", names, "cache_aware=true", f"calibration=[{auto.calibration}]")
    with pytest.raises(UsageError, match="7 cannot be kept of the 6") as caught:
        train("many", "num_strategies=7")
    assert "auto" in caught.value.hint
