"""Routers over strategies: they learn whose turn it is, by layer and by prompt, and are saved for the model alone."""

import io
import json
import tempfile
from operator import methodcaller

import matplotlib.image
import numpy as np
import pytest
import torch
import transformers
from small_models import SMALL

from pikv_core.cache import PiKVCache, calibration
from pikv_core.components import Component
from pikv_core.data.recall import Recall, RecallSource
from pikv_core.data.tokenizer import build_word_level
from pikv_core.errors import UsageError
from pikv_core.jobs import policy_router as job
from pikv_core.model.steps import feed
from pikv_core.recipes import load
from pikv_core.runs import Reporter, Run
from pikv_core.scheduling.moe_router import WEIGHTS, MoERouter, num_features
from pikv_core.schema import PolicyRouterSettings
from pikv_core.training import policy_router, router_lessons
from pikv_core.training.strategy_picture import HEIGHT, WIDTH, draw_choices

TASK = Recall(num_keys=16, num_values=8, num_filler=16)
SETTINGS = PolicyRouterSettings(
    length=64, budgets=[0.4], samples=4, validation_samples=2, eval_samples=4, steps=120, noise=0.5
)
L, N, E, F = 2, 512, 6, num_features(8)


@pytest.fixture
def source():
    return RecallSource(TASK, build_word_level(TASK.words()))


@pytest.fixture
def model(source):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "vocab_size": source.vocab_size}))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model.eval()


def run_in(folder):
    return Run(load("train", None, ["start=given", "policy_router={}"], {"out": str(folder)}))


def planted(best, seed):
    """Return lessons of random features, in which the strategy best(layer, x) [N] costs a tenth of the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, N, F, generator=generator)
    x[..., :L], x[..., -1] = x[..., :L].sign(), 1
    cost = torch.rand(L, N, E, generator=generator) * 0.2 + 0.9
    for layer in range(L):
        cost[layer].scatter_(1, best(layer, x[layer])[:, None], 0.1)
    return router_lessons.Lessons(x, cost, 1 - cost.clamp(max=1), torch.full((N, E), 0.4), "0" * 64, N)


class Planted:
    """Prompts that lose, in all, the sum of what each layer's lessons say."""

    def __init__(self, lessons):
        self.features, self.cost = lessons.features, lessons.cost
        self.shape, self.kind, self.place = tuple(self.cost.shape), "planted", (0, 0)

    def together(self, choices):
        return torch.stack([(choose(self) * self.cost).sum(dim=(0, 2)) for choose in choices], dim=-1)

    def oracle(self):
        return torch.nn.functional.one_hot(self.cost.argmin(dim=-1), E).float()


def measured_on(lessons, policy, fitted, start):
    """Stand for the prompts' caches by what was planted."""
    metrics, chosen, _ = policy_router.measure([Planted(lessons)], policy, fitted, start, seed=0)
    return metrics, policy_router.usage(chosen)


def by_layer(layer, x):
    return torch.full((len(x),), 1 if layer % 2 == 0 else 4)


def by_prompt(layer, x):
    return torch.where(x[:, layer] > 0, 2, 5)


def started(policy):
    state = policy_router.new_router(policy.router, F, E, 1).state_dict()
    state = {f"router/{name}": torch.stack([value] * L) for name, value in state.items()}
    return {**state, "feature_mean": torch.zeros(L, F), "feature_scale": torch.ones(L, F)}


@pytest.mark.parametrize("router", ["base", "pikv"])
@pytest.mark.parametrize(("rule", "least"), [(by_layer, 0.95), (by_prompt, 0.95)])
def test_a_planted_rule_is_learnt(tmp_path, rule, least, router):
    torch.manual_seed(0)
    policy = MoERouter(router=router)
    start = started(policy)
    fitted = policy_router.learn(planted(rule, 1), policy, start, SETTINGS, run_in(tmp_path), best_of(planted(rule, 1)))
    assert not torch.equal(fitted["router/weight"], start["router/weight"])  # gradients have come this far
    unseen = planted(rule, 2)
    found, usage = measured_on(unseen, policy, fitted, start)
    assert found["oracle"] == pytest.approx(0.1 * L)
    assert (found["random"] - found["chosen"]) / (found["random"] - found["oracle"]) > least
    assert found["gap_closed"] > least - 0.1
    if rule is by_layer:
        assert all(shares[1 if layer % 2 == 0 else 4] > 0.95 for layer, shares in enumerate(usage))


def test_a_few_prompts_on_which_much_is_lost_count_for_what_is_lost(tmp_path):
    lessons = planted(by_layer, 1)
    lessons.features[:, :, 0] = 0.0
    lessons.features[:, :4, 0] = -2.0
    lessons.cost[:, :4] = 0.1
    lessons.cost[:, :4, [1, 4]] = 100.0
    policy = MoERouter()
    start = started(policy)
    fitted = policy_router.learn(lessons, policy, start, SETTINGS, run_in(tmp_path), best_of(lessons))
    found, _ = measured_on(lessons, policy, fitted, start)
    assert found["chosen"] < 0.2 * L < found["best_single"]


def test_routers_that_learnt_too_little_take_the_best_single_strategy(tmp_path):
    policy = MoERouter()
    start = started(policy)
    lessons = planted(by_prompt, 1)
    lessons.cost[..., 3] = 0.05  # always best
    best = best_of(lessons)
    wrong = policy_router.learn(planted(by_prompt, 1), policy, start, SETTINGS, run_in(tmp_path), best)
    leant, aversion, margin = policy_router.hedge([Planted(lessons)], policy, {1.0: wrong}, best)
    assert best == 3 and aversion is None and margin == policy_router.ALWAYS
    found, usage = measured_on(lessons, policy, leant, start)
    assert found["chosen"] == pytest.approx(found["best_single"]) and all(shares[3] == 1 for shares in usage)


def test_routers_that_know_better_lean_no_further_than_is_good(tmp_path):
    policy = MoERouter()
    start = started(policy)
    lessons, unseen = planted(by_prompt, 1), planted(by_prompt, 2)
    best = best_of(unseen)
    run = run_in(tmp_path)
    learnt = {k: policy_router.learn(lessons, policy, start, SETTINGS, run, best, k) for k in (1.0, 4.0)}
    leant, aversion, margin = policy_router.hedge([Planted(unseen)], policy, learnt, best)
    assert aversion in learnt and margin in policy_router.MARGINS
    gain = {key: gain_of(unseen, policy, own, best) for key, own in {**learnt, None: leant}.items()}
    assert gain[None] >= max(gain.values()) - 1e-6


def gain_of(lessons, policy, fitted, best):
    """Return the mean gain over the best single strategy, less its standard error."""
    prompts = Planted(lessons)
    cost = prompts.together([router_lessons.always(best), policy_router.choice(policy, fitted)])
    gain = cost[:, 0] - cost[:, 1]
    return float(gain.mean() - gain.std() / len(gain) ** 0.5)


def best_of(lessons):
    return policy_router.best_single([Planted(lessons)])


def test_costs_are_what_one_layer_under_one_strategy_changes(model, source):
    ids = torch.from_numpy(source.batch(np.random.default_rng(3), 2, 64, "test").ids)
    recipe = {"policy": "snapkv", "budget": 0.4}
    context, later = ids[:, :48], ids[:, 48:]
    with torch.no_grad():
        full = model(ids).logits[:, 48:].log_softmax(-1)
        expected = []
        for index in range(3):
            cache = PiKVCache.for_model(model, recipe)
            cache.hold()
            feed(model, cache, context)
            cache.own_layers[index].compress()
            position = torch.arange(48, 64).expand(2, -1)
            found = model(later, position_ids=position, past_key_values=cache).logits.log_softmax(-1)
            expected.append((full.exp() * (full - found)).sum(-1).mean(-1))
    prompts = router_lessons.Prompts(ids, 48, torch.zeros_like(ids, dtype=torch.bool))
    cost, _ = held(model, prompts).costs(None)
    torch.testing.assert_close(cost[:, :, 3], torch.stack(expected), rtol=1e-3, atol=1e-5)
    assert bool((cost > -1e-6).all())


def test_costs_among_others_and_the_oracle_are_of_the_whole_cache(model, source):
    ids = torch.from_numpy(source.batch(np.random.default_rng(3), 2, 64, "test").ids)
    prompts = held(model, router_lessons.Prompts(ids, 48, torch.zeros_like(ids, dtype=torch.bool)))
    E = prompts.shape[2]
    singles = [router_lessons.always(strategy) for strategy in range(E)]
    single = prompts.together(singles)
    cost, _ = prompts.costs(singles[4](prompts))
    torch.testing.assert_close(cost[:, :, 4], single[:, 4].expand(3, -1))  # one more layer of the same is all of them
    recipe = {"policy": "semantic", "budget": 0.4}
    with torch.no_grad():
        cache = PiKVCache.for_model(model, recipe)
        feed(model, cache, ids[:, :48])
        found = router_lessons.log_probs(model, cache, ids[:, 48:])
    torch.testing.assert_close((prompts.full.exp() * (prompts.full - found)).sum(-1).mean(-1), single[:, 4])
    assert bool((prompts.together([methodcaller("oracle")])[:, 0] <= single.amin(dim=-1) + 1e-6).all())


def held(model, prompts):
    with tempfile.TemporaryDirectory() as temporary:
        policy = MoERouter()
        tensors = policy_router.untrained(model, policy, {}, 0, num_features(model.config.head_dim))
        member = calibration.Member("moe-router", "policy", {}, tensors)
        nothing = calibration.Corpus(source="", sha256="", num_tokens=0)
        calibration.save(f"{temporary}/c", "small", model, nothing, [member])
        recipe = {"policy": "moe-router", "budget": 0.4, "calibration": [f"{temporary}/c"]}
        return router_lessons.Held(model, recipe, prompts)


def test_the_job_saves_what_the_policy_goes_by_of_this_model_alone(tmp_path, model, source):
    model.save_pretrained(tmp_path / "model")
    source.save(tmp_path / "model")
    given = SETTINGS.model_dump(include={"length", "budgets", "samples", "validation_samples", "eval_samples", "steps"})
    settings = [f"policy_router.{name}={value}" for name, value in given.items()]
    settings += ["policy_router.strategies=[snapkv, semantic, aggressive]", "policy_router.router=pikv"]
    recipe = load("train", None, [f"start={tmp_path / 'model'}", f"out={tmp_path / 'run'}", *settings])
    result = job.run(recipe, Run(recipe))
    assert result.strategies == ["snapkv", "semantic", "aggressive"]
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in result.usage)
    assert set(result.metrics) >= {"chosen", "best_single", "random", "oracle", "untrained", "single/semantic"}
    assert (tmp_path / "run" / "choices.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["result"]["metrics"] == result.metrics

    policy = {"name": "moe-router", "top_k": 2}
    cache = PiKVCache.for_model(model, {"policy": policy, "budget": 0.25, "calibration": [str(tmp_path / "run")]})
    with torch.no_grad():
        feed(model, cache, torch.arange(1, 41)[None] % source.vocab_size)
    assert cache.num_stored == [10] * len(cache.own_layers)
    assert all(layer.run.own[WEIGHTS].shape == (1, 3) for layer in cache.own_layers)
    asked = Component("moe-router", {"router": "base"})
    with pytest.raises(UsageError, match="fitted with router pikv, not base"):
        calibration.fitted([result.calibration], "policy", asked, model.config)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(0.5)
    with pytest.raises(UsageError, match="other weights") as caught:
        PiKVCache.for_model(model, {"policy": "moe-router", "budget": 0.25, "calibration": [result.calibration]})
    assert "policy-router.yaml" in caught.value.hint


def test_needles_lie_in_the_half_they_are_said_to_and_are_all_that_is_asked_for(tmp_path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rng = np.random.default_rng(0)
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(" ".join(rng.choice(words, 200)))
    task = Recall(filler="text", num_keys=16, num_values=8, vocab_size=400)
    source = task.open(None, 0, [str(tmp_path)], None, Reporter())
    ids = source.tokenizer.get_vocab()
    keys = [ids[word] for word in task.words()[2:18]]
    settings = SETTINGS.model_copy(update={"length": 256})
    assert router_lessons.domains(source) == ("needles early", "needles late", "text")
    for domain, half in (("needles early", 0), ("needles late", 1)):
        prompts = router_lessons.draw(source, domain, np.random.default_rng(1), 3, settings, "test")
        C = prompts.num_context
        is_key = np.isin(prompts.ids[:, :C], keys)
        first, second = is_key[:, :128].sum(), is_key[:, 128:].sum()
        assert (first, second)[half] > 0 == (first, second)[1 - half]
        assert int(prompts.is_answer.sum()) > 0 == int(prompts.is_answer[:, : C - 1].sum())
        for row, at in prompts.is_answer.nonzero().tolist():
            needle = prompts.ids[row, :C].tolist()
            asked, answer = prompts.ids[row, at : at + 2].tolist()
            assert answer == needle[needle.index(asked) + 1]
    text = router_lessons.draw(source, "text", np.random.default_rng(1), 3, settings, "test")
    assert text.num_context == settings.num_context and not np.isin(text.ids, keys).any()


def test_the_picture_has_a_colour_for_each_choice():
    strategies, weights = ["a", "b", "c"], torch.zeros(2, 4, 3)
    weights[0, :, 0] = weights[1, :2, 1] = weights[1, 2:, 2] = 1
    png = draw_choices(weights, ["early", "late", "early", "late"], strategies)
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    assert pixels.shape[:2] == (HEIGHT, WIDTH)
    tab10 = [matplotlib.colormaps["tab10"](at)[:3] for at in range(4)]
    shares = [float(np.isclose(pixels, colour, atol=0.01).all(-1).mean()) for colour in tab10]
    assert shares[0] > 1.8 * shares[1] > 0 and shares[1] == pytest.approx(shares[2], rel=0.1) and shares[3] == 0
