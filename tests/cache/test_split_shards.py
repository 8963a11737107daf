"""A cache that is split over ranks by shards is the whole one: its logits, tokens, bytes, states."""

import pytest
import torch
from test_split_cache import decode
from thread_ranks import on_ranks

from pikv_core.cache import PiKVCache
from pikv_core.cache.ranks import Wire
from pikv_core.cache.ranks_log import RankChanges, RankReplay
from pikv_core.cache.ranks_snapshot import part_of
from pikv_core.cache.snapshot import restore, take
from pikv_core.errors import UsageError
from pikv_core.model.steps import feed, prefill, step

PROMPT, STEPS = 200, 40
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


def of_shards(budget=1.0, codec="none", **options):
    policy = {"name": "expert-shards", "shards": 8, "sinks": 4, "newest": 24, "page_tokens": 8, **options}
    return {"policy": policy, "budget": budget, "codec": codec}


def prompts(rows, length, seed=1):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def held(cache, layer):
    """Return the tokens in shards, (row, head, position), and those in none."""
    (lane,) = cache.own_layers[layer].lanes
    empty = torch.full((1, 1, 0), -1)
    stores = [store.position if store.num_slots else empty for store in (lane.body, lane.tail)]
    return [
        [(*at, int(x[tuple(at)])) for at in (x >= 0).nonzero().tolist()] and sorted(
            (b, g, int(x[b, g, s])) for b, g, s in (x >= 0).nonzero().tolist()
        )
        for x in stores
    ]


CASES = [
    ("llama", of_shards(top_shards=2)),
    ("llama", of_shards(top_shards=8)),
    ("llama", of_shards(0.4)),
    ("llama", of_shards(80, promise="centroid", top_shards=4)),
    ("qwen3_moe", of_shards(0.3, by="router", shards=5)),
    ("llama", of_shards(top_shards=3, slow_shards=2, latency=10.0, latency_weight=0.5)),
]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("arch", "recipe"), CASES)
def test_ranks_are_as_one(small_model, arch, recipe, count):
    model, ids = small_model(arch), prompts(2, PROMPT)
    whole = PiKVCache.for_model(model, recipe)
    with torch.no_grad():
        logits, tokens = decode(model, whole, ids, STEPS)

    def work(wire):
        cache = PiKVCache.for_model(model, recipe).share("shards", wire, model)
        return cache, *decode(model, cache, ids, STEPS)

    found = on_ranks(count, work)
    for _, own_logits, own_tokens in found:
        assert torch.equal(own_tokens, tokens)
        torch.testing.assert_close(own_logits, logits, **CLOSE)
        assert torch.equal(own_logits, found[0][1])
    for layer in range(3):
        body, tail = held(whole, layer)
        parts = [held(cache, layer) for cache, *_ in found]
        assert sorted(token for own, _ in parts for token in own) == body and len(body) > 100
        assert all(own == tail for _, own in parts)
