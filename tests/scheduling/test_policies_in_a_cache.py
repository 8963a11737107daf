"""Policies at work: which tokens a layer holds after each step, and a model's cache after a prompt, by plain lists."""

import math

import pytest
import torch
from scheduling import references
from single_layer import single_layer
from small_models import use_stock_attention

from pikv_core.cache import PiKVCache
from pikv_core.components import Component
from pikv_core.model.steps import feed
from pikv_core.scheduling.allocation.pyramid import Pyramid
from pikv_core.scheduling.keydiff import KeyDiff
from pikv_core.scheduling.knorm import KNorm
from pikv_core.scheduling.lfu import LFU
from pikv_core.scheduling.lru import LRU
from pikv_core.scheduling.snapkv import SnapKV
from pikv_core.scheduling.tova import TOVA
from pikv_core.scheduling.window import Window
from pikv_core.schema import CacheRecipe

G, R, D = 2, 2, 8


class Lists:
    """One row's heads in plain lists: tokens with position, key, last use, number of uses and newest attention."""

    def __init__(self):
        self.heads = [[] for _ in range(G)]
        self.num_seen = 0

    def feed(self, queries, keys):
        """Take queries [G,R,T,D] and keys [G,T,D], float64, and note what they attend to."""
        num_new = keys.shape[1]
        for head, tokens in enumerate(self.heads):
            for t in range(num_new):
                at = self.num_seen + t
                tokens.append({"at": at, "key": keys[head, t].tolist(), "used": at, "uses": 0, "newest": 0.0})
                logits = torch.stack([torch.tensor(x["key"], dtype=torch.float64) for x in tokens]) @ (
                    queries[head, :, t].T * D**-0.5
                )
                attention = logits.softmax(0).mean(1).tolist()
                for token, share in zip(tokens, attention):
                    is_used = share > 1 / len(tokens)
                    token["uses"] += is_used
                    token["newest"] = share
                    if is_used and num_new == 1:
                        token["used"] = at
        self.num_seen += num_new

    def keep(self, capacity, rank):
        """Keep the `capacity` tokens of every head that `rank` puts highest."""
        self.heads = [
            sorted(sorted(tokens, key=rank(self, tokens))[-capacity:], key=lambda x: x["at"]) for tokens in self.heads
        ]

    def positions(self):
        return [[token["at"] for token in tokens] for tokens in self.heads]


def by_tova(lists, _):
    newest = {}
    for tokens in lists.heads:
        for token in tokens:
            newest[token["at"]] = newest.get(token["at"], 0.0) + token["newest"]
    return lambda x: math.inf if x["at"] == lists.num_seen - 1 else newest[x["at"]]


def by_keydiff(_, tokens):
    score = references.keydiff([x["key"] for x in tokens])
    return lambda x: score[[y["at"] for y in tokens].index(x["at"])]


CASES = {
    "window": (Window(), lambda *_: lambda x: x["at"]),
    "lru": (LRU(), lambda *_: lambda x: (x["used"], x["at"])),
    "lfu": (LFU(), lambda *_: lambda x: (x["uses"], x["at"])),
    "tova": (TOVA(), by_tova),
    "knorm": (KNorm(), lambda *_: lambda x: references.knorm([x["key"]])[0]),
    "keydiff": (KeyDiff(), by_keydiff),
}


# Two keys are equally far from their mean, so that a budget of one token would let KeyDiff keep either.
@pytest.mark.parametrize("name, budget", [(x, y) for x in CASES for y in (1, 5, 0.4) if (x, y) != ("keydiff", 1)])
def test_a_layer_holds_what_plain_lists_hold_after_every_step(name, budget):
    policy, rank = CASES[name]
    layer, lists = single_layer(policy, budget), Lists()
    generator = torch.Generator().manual_seed(3)
    for num_new in (16, *[1] * 12, 5, *[1] * 6):
        query = 3 * torch.randn(1, G * R, num_new, D, generator=generator)
        key, value = torch.randn(2, 1, G, num_new, D, generator=generator)
        layer.update(key, value)
        layer.attend(query, D**-0.5)
        lists.feed(query[0].unflatten(0, (G, R)).double(), key[0].double())
        lists.keep(budget if isinstance(budget, int) else max(1, int(lists.num_seen * budget + 1e-6)), rank)
        assert layer.positions()[0].sort().values.tolist() == lists.positions()


def test_snapkv_decides_at_the_end_of_a_prompt_and_keeps_what_comes_later():
    policy = SnapKV(window=4, kernel=3)
    layer = single_layer(policy, 10)
    generator = torch.Generator().manual_seed(3)
    query, keys, values = torch.randn(3, 1, 2, 30, D, generator=generator)
    layer.update(keys, values)
    layer.attend(query, D**-0.5)
    attention = torch.softmax((query @ keys.mT).double() * D**-0.5 + torch.full((30, 30), -torch.inf).triu(1), dim=-1)
    ranked = []
    for head in range(2):
        score = references.snapkv([attention[0, head].tolist()], 30, 10, 4, 3, "avg")
        ranked.append(sorted(range(30), key=lambda s: (score[s], s))[-10:])
    assert layer.positions()[0].sort().values.tolist() == [sorted(kept) for kept in ranked]
    for at in range(30, 38):
        query, key, value = torch.randn(3, 1, 2, 1, D, generator=generator)
        layer.update(key, value)
        layer.attend(query, D**-0.5)
        num_dropped = at - 29
        expected = [sorted(kept[num_dropped:]) + list(range(30, at + 1)) for kept in ranked]
        assert layer.positions()[0].sort().values.tolist() == expected


@pytest.fixture
def prompts():
    """Return ids [2,40] and their mask; the second row begins with 9 tokens of padding."""
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return ids, mask


def stock_attention(model, ids):
    """Return the attention of transformers' own code: per layer and key/value head, [R][q][s] in lists."""
    use_stock_attention(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(ids[None], output_attentions=True).attentions
    return [layer[0].double().unflatten(0, (2, -1)).tolist() for layer in attention]


def cache_after(model, prompts, **recipe):
    ids, mask = prompts
    recipe = {
        key: Component(x["name"], {k: v for k, v in x.items() if k != "name"}) if isinstance(x, dict) else x
        for key, x in recipe.items()
    }
    cache = PiKVCache.for_model(model, CacheRecipe(**recipe))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return cache


def held(cache, layer, row, head):
    position = cache.positions[layer][row, head]
    return position[position >= 0].sort().values.tolist()


def best(score, num_tokens):
    return sorted(sorted(range(len(score)), key=lambda s: (score[s], s))[-num_tokens:])


POLICIES_ON_MODELS = {
    "snapkv": lambda a, g, t: references.snapkv(a[g], t, int(0.25 * t), 6, 5, "avg"),
    "tova": lambda a, g, t: references.tova(a),
    "lfu": lambda a, g, t: references.lfu(a[g], 1.0),
    "h2o": lambda a, g, t: references.h2o(a[g], int(0.25 * t), 0.5),
}


@pytest.mark.parametrize("name", POLICIES_ON_MODELS)
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_a_models_cache_keeps_what_its_own_attention_says(name, arch, small_model, prompts):
    model = small_model(arch)
    policy = {"name": name, "window": 6} if name == "snapkv" else {"name": name}
    cache = cache_after(model, prompts, policy=policy, budget=0.25)
    for row, pad in enumerate((0, 9)):
        attention = stock_attention(model, prompts[0][row, pad:])
        num_tokens = 40 - pad
        for layer, by_head in enumerate(attention):
            for head in range(2):
                score = POLICIES_ON_MODELS[name](by_head, head, num_tokens)
                assert held(cache, layer, row, head) == best(score, int(0.25 * num_tokens)), (layer, row, head)


@pytest.mark.parametrize("policy", ["h2o", "tova", "snapkv"])
def test_a_pyramid_of_layers_is_really_stored(policy, small_model, prompts):
    allocation = {"name": "pyramid", "window": 4}
    cache = cache_after(small_model("llama"), prompts, policy=policy, budget=0.25, allocation=allocation)
    for row, num_tokens in enumerate((40, 31)):
        mean = torch.tensor([num_tokens // 4])
        expected = Pyramid(window=4).layers(mean, torch.tensor([num_tokens]), 3, {})[0].tolist()
        assert expected[0] > expected[-1]
        assert [[len(held(cache, layer, row, head)) for head in range(2)] for layer in range(3)] == [
            [budget] * 2 for budget in expected
        ]


def test_entropy_gives_layers_what_their_own_attention_says(small_model, prompts):
    model = small_model("llama")
    cache = cache_after(model, prompts, policy="h2o", budget=0.25, allocation={"name": "entropy", "queries": 8})
    for row, pad in enumerate((0, 9)):
        attention = stock_attention(model, prompts[0][row, pad:])
        entropy = [references.entropy(layer, 8) for layer in attention]
        mean = (40 - pad) // 4
        wish = [mean * 3 * x / math.fsum(entropy) for x in entropy]
        budgets = [len(held(cache, layer, row, 0)) for layer in range(3)]
        assert sum(budgets) == 3 * mean and all(abs(got - x) < 1 for got, x in zip(budgets, wish))


def test_ada_kv_frees_what_it_takes_from_a_head(small_model, prompts):
    model = small_model("llama")
    policy = {"name": "h2o", "heavy_share": 0.9}
    uniform = cache_after(model, prompts, policy=policy, budget=0.25)
    cache = cache_after(model, prompts, policy=policy, budget=0.25, allocation={"name": "ada-kv", "alpha": 0.0})
    unequal = 0
    for row, pad in enumerate((0, 9)):
        attention = stock_attention(model, prompts[0][row, pad:])
        mean = (40 - pad) // 4
        for layer, by_head in enumerate(attention):
            scores = [references.h2o(head, mean, 0.9) for head in by_head]
            counts = references.ada_kv_counts(scores, mean)
            assert [len(held(cache, layer, row, head)) for head in range(2)] == counts
            assert [held(cache, layer, row, head) for head in range(2)] == [best(s, n) for s, n in zip(scores, counts)]
            unequal += counts[0] != counts[1]
    assert unequal >= 3
    page = 8 * (2 * 16 * 4 + 8)  # slots, of keys and values of 16 float32, a position and a sum each
    assert cache.resident_bytes <= uniform.resident_bytes + 3 * 4 * page


def test_heads_share_the_budget_of_a_row_that_has_only_had_padding(small_model, prompts):
    """The second row's first tokens come after the heads' shares were decided; from then on it holds its half."""
    model, ids = small_model("llama"), prompts[0]
    cache = PiKVCache.for_model(model, {"policy": "h2o", "allocation": "ada-kv", "budget": 0.5})
    is_token = torch.ones(2, 20, dtype=torch.bool)
    is_token[1] = False
    feed(model, cache, ids[:, :20], is_token)
    for _ in range(2):
        feed(model, cache, ids[:, 20:30], torch.ones(2, 10, dtype=torch.bool))
    for layer in range(3):
        assert [len(held(cache, layer, 1, head)) for head in range(2)] == [10, 10]


def test_statistics_go_once_a_score_is_taken_in_lanes_too(small_model, prompts):
    policy = {"name": "snapkv", "window": 2}
    recipe = {
        "policy": policy,
        "allocation": "ada-kv",
        "codec": {"name": "int8", "group": 8, "residual": 8},
        "budget": 0.5,
    }
    cache = PiKVCache.for_model(small_model("llama"), recipe)
    feed(small_model("llama"), cache, prompts[0][:1])
    lanes = [lane for layer in cache.own_layers for lane in layer.lanes]
    assert len(lanes) > 3
    assert all([*store.columns()] == ["score"] for lane in lanes for store in lane.stores)
