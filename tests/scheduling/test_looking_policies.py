"""KVzip and the oracle, which are shown more than the prompt, against plain maxima and sums."""

import math

import pytest
import torch
from scheduling.synthetic import World, observe_and_score
from small_models import use_stock_attention

from pikv_core.cache import PiKVCache
from pikv_core.components import Component
from pikv_core.model.steps import prefill, step
from pikv_core.scheduling.kvzip import KVzip
from pikv_core.scheduling.oracle import Oracle
from pikv_core.schema import CacheRecipe


def peak(attention, queries, s):
    return max(head[q][s] for head in attention for q in queries)


def future_mass(attention, queries, s):
    return math.fsum(head[q][s] for head in attention for q in queries) / len(attention)


POLICIES = {"kvzip": (KVzip(), peak), "oracle": (Oracle(), future_mass)}


@pytest.mark.parametrize("name", POLICIES)
def test_score_is_the_formula(name):
    policy, rule = POLICIES[name]
    world = World()
    score = observe_and_score(policy, world)
    _, G, _, S, _ = world.shape
    for row, pad in enumerate(world.padding):
        for head in range(G):
            attention = world.attention[row, head].tolist()
            expected = [rule(attention, range(S), s) for s in range(pad, S)]
            torch.testing.assert_close(score[row, head, pad:], torch.tensor(expected))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("arch", ["llama", "mixtral"])
@torch.no_grad()
def test_a_models_cache_keeps_what_the_look_says(name, arch, small_model):
    model, rule = small_model(arch), POLICIES[name][1]
    ids = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    shown = ids if name == "kvzip" else torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(2))
    cache = PiKVCache.for_model(model, CacheRecipe(policy=Component(name), budget=6))
    logits = prefill(model, cache, ids, future=shown)
    held = [cache.positions[layer].clone() for layer in range(3)]
    for at in range(3):
        step(model, cache, shown[:, at])

    use_stock_attention(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits, model(ids).logits[:, -1])
    whole = model(torch.cat((ids, shown), dim=1), output_attentions=True).attentions
    queries = range(24, 24 + shown.shape[1])
    for index, attention in enumerate(whole):
        by_head = attention.double().unflatten(1, (2, -1)).tolist()
        for row in range(2):
            for head in range(2):
                score = [rule(by_head[row][head], queries, s) for s in range(24)]
                best = sorted(range(24), key=lambda s: score[s], reverse=True)
                assert held[index][row, head].sort().values.tolist() == sorted(best[:6])
                later = cache.positions[index][row, head].sort().values.tolist()
                assert later == sorted([*best[:3], 24, 25, 26]), "what comes later stays, the least scored goes"
