"""A cache that is split over ranks, by heads or by tokens, is the whole one: its logits, tokens, bytes."""

import pytest
import torch
from thread_ranks import on_ranks

from pikv_core.cache import PiKVCache
from pikv_core.cache.ranks import Turns
from pikv_core.errors import UsageError
from pikv_core.model.steps import prefill, step
from pikv_core.scheduling import POLICIES

PROMPT, STEPS = 150, 60
APART = [name for name in POLICIES.names() if POLICIES[name].heads_apart]


def decode(model, cache, ids, num_steps=STEPS):
    """Return the logits of a prompt [B,T] and of greedy steps, and the tokens [B,steps]."""
    logits, tokens = [prefill(model, cache, ids)], []
    for _ in range(num_steps):
        tokens.append(logits[-1].argmax(dim=-1))
        logits.append(step(model, cache, tokens[-1]))
    return torch.stack(logits), torch.stack(tokens, dim=1)


def check(model, recipe, split, count, rows=1):
    """Assert that ranks decode as one process does; return their caches, wires, and the whole cache."""
    ids = torch.randint(1, 97, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    whole = PiKVCache.for_model(model, recipe)
    with torch.no_grad():
        logits, tokens = decode(model, whole, ids)
    wires = []

    def work(wire):
        wires.append(wire)
        cache = PiKVCache.for_model(model, recipe).share(split, wire, model)
        return cache, *decode(model, cache, ids)

    found = on_ranks(count, work)
    for _, own_logits, own_tokens in found:
        assert torch.equal(own_tokens, tokens)
        torch.testing.assert_close(own_logits, logits, atol=2e-4, rtol=2e-4)
        assert torch.equal(own_logits, found[0][1])  # to the bit, so that sampling draws the same everywhere
    caches = [cache for cache, *_ in found]
    assert_same_tokens_held(whole, caches, split)
    assert all(cache.full_bytes == whole.full_bytes for cache in caches)
    return caches, wires, whole


def assert_same_tokens_held(whole, caches, split):
    for layer, positions in enumerate(whole.positions):
        parts = [cache.positions[layer] for cache in caches if cache.own_layers[layer].num_stored]
        if split == "heads":
            longest = max(part.shape[2] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, longest - part.shape[2]), value=-1) for part in parts]
        held = torch.cat(parts, dim=1 if split == "heads" else 2)
        for one, other in zip(held.flatten(0, 1), positions.flatten(0, 1), strict=True):
            assert one[one >= 0].sort().values.tolist() == other[other >= 0].sort().values.tolist()


def recipe_of(policy, codec="none"):
    budget = {"full": 1.0, "quest": 64, "kvzip": 64, "snapkv": 64}.get(policy, 48)
    return {"policy": policy, "budget": budget, "codec": codec}


@pytest.mark.parametrize("codec", ["none", {"name": "int8", "group": 32, "residual": 16}])
@pytest.mark.parametrize("policy", APART)
def test_by_heads_every_policy_that_keeps_them_apart_is_as_alone(small_model, policy, codec):
    recipe = recipe_of(policy, codec)
    if policy == "quest":
        recipe["policy"] = {"name": "quest", "dense_layers": 1}
    check(small_model("llama"), recipe, "heads", 2)


TOKENS = [
    ("full", 1.0, "none"),
    ("full", 1.0, {"name": "int4", "group": 32, "residual": 20}),
    ("full", 1.0, {"name": "fp8", "page": 8}),
    ("streaming-llm", 53, "none"),
    ("window", 53, "none"),
]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("policy", "budget", "codec"), TOKENS)
def test_by_tokens_ranks_are_as_one(small_model, policy, budget, codec, count):
    check(small_model("llama"), {"policy": policy, "budget": budget, "codec": codec}, "tokens", count)


@pytest.mark.parametrize("arch", ["mistral", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("split", ["heads", "tokens"])
def test_windows_sinks_and_caps_are_kept(small_model, arch, split):
    check(small_model(arch), {}, split, 2)
