"""Expert shards: every token once, in its expert's shard; against brute force, the whole attention and the routers."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from single_layer import single_layer
from small_calibration import codecs, write

from pikv_core.cache import ExpertKVCache, PiKVCache
from pikv_core.cache.shards.clusters import assign
from pikv_core.cache.store import Store
from pikv_core.compression.int8 import Int8
from pikv_core.compression.none import Plain
from pikv_core.errors import UsageError
from pikv_core.model.steps import feed
from pikv_core.observation import LayerRun, Reads
from pikv_core.scheduling.expert_shards import ExpertShards
from pikv_core.scheduling.quest import Quest
from pikv_kernels.attend_tokens import attend_pages

B, H, G, D = 2, 4, 2, 16
R = H // G
ROUTED = {"dense_layers": 0, "by": "router", "sinks": 4, "newest": 24}


def routed_layer(selector, num_prompt, budget=1.0):
    """Return a layer behind a prompt, its keys and values, the experts of its tokens, and what feeds one more."""
    generator = torch.Generator().manual_seed(0)
    run = LayerRun(0, 1, routing=SimpleNamespace(expect=lambda layer: None))
    layer = single_layer(selector, budget, run=run)
    held = [torch.randn(B, G, num_prompt, D, generator=generator) for _ in range(2)]
    expert = torch.randint(0, 6, (B, num_prompt), generator=generator)
    layer.update(*held)
    layer.attend(torch.randn(B, H, num_prompt, D, generator=generator), D**-0.5)
    layer.take_experts(expert.flatten())

    def one_more():
        nonlocal held, expert
        query, *new = (torch.randn(B, n, 1, D, generator=generator) for n in (H, G, G))
        held = [torch.cat(pair, dim=2) for pair in zip(held, new)]
        in_shards = layer.lanes[0].body.position.clone()
        layer.update(*new)
        output = layer.attend(query, D**-0.5)
        told = torch.randint(0, 6, (B, 1), generator=generator)
        expert = torch.cat([expert, told], dim=1)
        layer.take_experts(told.flatten())
        return query.view(B, G, R, D), held, expert, in_shards, output.view(B, G, R, D)

    return layer, one_more


def read_by_force(rows, keys, shard, in_shards, num_shards, top):
    """Return the tokens that rows [R,D] read of keys [S,D]: those outside of shards, and of the best `shard` [S]."""
    sharded = in_shards[in_shards >= 0].long()
    bound = []
    for number in range(num_shards):
        own = keys[sharded[shard[sharded] == number]]
        ends = (own.amax(0), own.amin(0)) if len(own) else None
        bound.append(sum(torch.maximum(q * ends[0], q * ends[1]).sum().item() for q in rows) if ends else -torch.inf)
    best = sorted(range(num_shards), key=lambda number: -bound[number])[:top]
    outside = torch.ones(len(keys), dtype=torch.bool)
    outside[sharded] = False
    return torch.where(outside | torch.isin(shard[: len(keys)], torch.tensor(best)))[0]


def attend_by_force(rows, keys, values, read):
    return (rows @ keys[read].T * D**-0.5).softmax(-1) @ values[read]


@pytest.mark.parametrize("num_shards", [3, 8])
def test_reads_the_best_shards_the_first_and_the_newest_tokens(num_shards):
    """Experts 0 to 5 share three shards, or have eight, of which two stay empty."""
    layer, one_more = routed_layer(ExpertShards(shards=num_shards, top_shards=2, **ROUTED), 101)
    for _ in range(30):
        rows, (keys, values), expert, in_shards, output = one_more()
        for b in range(B):
            shard = expert[b] % num_shards
            for g in range(G):
                read = read_by_force(rows[b, g], keys[b, g], shard, in_shards[b, g], num_shards, 2)
                expected = attend_by_force(rows[b, g], keys[b, g], values[b, g], read)
                assert (output[b, g] - expected).abs().max() < 1e-5
    position = layer.lanes[0].tail.position[0, 0].tolist()
    assert position[:4] == [0, 1, 2, 3] and position[4:] == list(range(131 - len(position) + 4, 131))


def test_every_token_is_stored_once_in_pages_of_its_shard():
    layer, one_more = routed_layer(ExpertShards(shards=6, top_shards=2, **ROUTED), 150)
    for _ in range(20):
        _, held, expert, _, _ = one_more()
    keys, values, position = layer.retrieve()
    for b in range(B):
        for g in range(G):
            real = position[b, g] >= 0
            assert sorted(position[b, g][real].tolist()) == list(range(170))
            for found, exact in ((keys, held[0]), (values, held[1])):
                assert torch.equal(found[b, g][real], exact[b, g][position[b, g][real].long()])
            for page in layer.lanes[0].body.position[b, g].split(16):
                assert len({*expert[b][page[page >= 0].long()].tolist()}) <= 1
    assert layer.resident_bytes >= sum(x.nbytes for store in layer.lanes[0].stores for x in store._encoded.values())


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_all_shards_are_the_whole_attention_and_a_budget_is_a_part(budget):
    layer, one_more = routed_layer(ExpertShards(shards=6, top_shards=6, **ROUTED), 200, budget)
    layer.run.reads = reads = Reads()
    errors = []
    for _ in range(10):
        rows, (keys, values), _, _, output = one_more()
        expected = (rows @ keys.mT * D**-0.5).softmax(-1) @ values
        errors.append((output - expected).abs().max().item())
    whole = 10 * 2 * B * G * 200 * D * 4
    if budget == 1.0:
        assert max(errors) < 1e-5 and reads.num_bytes >= whole
    else:
        assert min(errors) > 1e-3 and 0.4 * whole < reads.num_bytes < 0.65 * whole


def test_reads_are_counted():
    """Those of Quest: a page's and the bounds' bytes; of shards: sinks, newest, the pages read, and what chose them."""
    layer = single_layer(Quest(dense_layers=0), 48)
    keys, values = torch.randn(2, B, G, 105, D).unbind(0)
    layer.update(keys[:, :, :104], values[:, :, :104])
    layer.attend(torch.randn(B, H, 104, D), D**-0.5)
    layer.run.reads = reads = Reads()
    pages = layer.lanes[0].plan.selector.score
    chosen = []
    type(layer.lanes[0].plan.selector).score = lambda self, *args: chosen.append(pages(*args)) or chosen[-1]
    try:
        layer.update(keys[:, :, 104:], values[:, :, 104:])
        layer.attend(torch.randn(B, H, 1, D), D**-0.5)
    finally:
        type(layer.lanes[0].plan.selector).score = pages.__func__
    top = chosen[0].topk(3).indices
    num_tokens = sum(9 if page == 6 else 16 for page in top.flatten().tolist())
    assert reads.num_bytes == num_tokens * 2 * D * 4 + B * G * 7 * 2 * D * 4

    layer, one_more = routed_layer(ExpertShards(shards=6, top_shards=2, slow_shards=6, **ROUTED), 150)
    layer.run.reads = reads = Reads()
    tail = layer.lanes[0].tail.num_slots + 1
    one_more()
    chose = B * G * 6 * (2 * D * 4 + 8) + layer.run.own["shards"]["shard_of_page"].nbytes
    assert reads.num_bytes == reads.slow_bytes + B * G * tail * 2 * D * 4 + chose
    assert reads.slow_bytes % (16 * 2 * D * 4) == 0 and reads.slow_bytes > 0


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_pages_that_are_none_are_not_read(backend):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, R, D, generator=generator)
    keys, values = torch.randn(2, 1, 2, 44, D, generator=generator).unbind(0)
    visible = torch.rand(1, 2, 1, 44, generator=generator) > 0.2
    pages = torch.tensor([[[2, -1, 0], [-1, 1, -1]]])
    part = attend_pages(query, keys, values, pages, 16, visible, 0.25, None, backend=backend)
    store = Store(Plain())
    store.append(keys, values, torch.where(visible[:, :, 0], torch.arange(44), -1))
    picked = store.pages(pages, 16)
    expected = picked.attend(query, (picked.position >= 0)[:, :, None], 0.25, None, False)
    assert (part.output - expected.output).abs().max() < 1e-5 and (part.lse - expected.lse).abs().max() < 1e-5


def test_latency_takes_reads_from_slow_shards():
    shares = []
    for weight in (0.0, 0.2, 100.0):
        selector = ExpertShards(shards=6, top_shards=2, slow_shards=3, latency=10.0, latency_weight=weight, **ROUTED)
        layer, one_more = routed_layer(selector, 300)
        layer.run.reads = reads = Reads()
        for _ in range(30):
            one_more()
        shares.append(reads.slow_bytes / reads.num_bytes)
    assert shares[0] > shares[1] > shares[2] == 0


def test_clusters_are_settled_means_and_padding_is_in_none():
    generator = torch.Generator().manual_seed(0)
    centres = 8 * torch.randn(1, 1, 5, D, generator=generator)
    which = torch.randint(0, 5, (1, 1, 200), generator=generator)
    keys = centres.gather(2, which[..., None].expand(-1, -1, -1, D)) + torch.randn(1, 1, 200, D, generator=generator)
    is_token = torch.rand(1, 1, 200, generator=generator) > 0.2
    nothing = torch.zeros(1, 1, 5), torch.zeros(1, 1, 5, D)
    shard = assign(keys, is_token, *nothing)
    assert torch.equal(shard, assign(keys, is_token, *nothing))
    noise = torch.where(is_token[..., None], keys, 1e3 * torch.randn(keys.shape, generator=generator))
    assert torch.equal(shard[is_token], assign(noise, is_token, *nothing)[is_token])
    own, kept = shard[is_token], keys[is_token]
    means = torch.stack([kept[own == number].mean(0) for number in own.unique()])
    assert torch.equal(torch.cdist(kept, means).argmin(-1), torch.searchsorted(own.unique(), own))
    count, total = torch.full((1, 1, 5), 3.0), 3 * centres
    assert torch.equal(assign(keys, is_token, count, total), torch.cdist(keys, centres).argmin(-1))


@pytest.mark.parametrize("by", ["keys", "router"])
def test_all_shards_give_the_logits_of_the_full_cache(small_model, by):
    """On a padded batch, in single steps, in a turn of several tokens, and after it."""
    model = small_model("mixtral")
    ids = torch.randint(1, 97, (2, 150), generator=torch.Generator().manual_seed(2))
    is_token = torch.ones_like(ids, dtype=torch.bool)
    is_token[1, :60] = False
    policy = {"name": "expert-shards", "shards": 4, "top_shards": 4, "newest": 16, "by": by}
    caches = [PiKVCache.for_model(model, recipe) for recipe in ({}, {"policy": policy})]
    for part in (slice(0, 100), *(slice(at, at + 1) for at in range(100, 110)), slice(110, 149), slice(149, 150)):
        expected, found = (feed(model, cache, ids[:, part], is_token[:, part]) for cache in caches)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert all(layer.lanes[0].body.num_slots for layer in caches[1].own_layers)


def test_a_row_has_the_shards_that_it_has_alone(small_model):
    model = small_model("llama")
    ids = torch.randint(1, 97, (2, 200), generator=torch.Generator().manual_seed(3))
    is_token = torch.ones_like(ids, dtype=torch.bool)
    is_token[0, :70] = False
    recipe = {"policy": {"name": "expert-shards", "top_shards": 2, "newest": 16}}
    together, alone = PiKVCache.for_model(model, recipe), PiKVCache.for_model(model, recipe)
    feed(model, together, ids, is_token)
    feed(model, alone, ids[:1, 70:])
    swapped = copy.deepcopy(together)
    swapped.reorder_cache(torch.tensor([1, 0]))
    for mixed, moved, own in zip(together.own_layers, swapped.own_layers, alone.own_layers):
        count = [layer.run.own["shards"]["count"] for layer in (mixed, moved, own)]
        assert torch.equal(count[0][0], count[2][0]) and torch.equal(count[1][1], count[2][0])
        both, one = mixed.lanes[0].body.position[0], own.lanes[0].body.position[0]
        for mine, its in zip(both, one):
            assert torch.equal(mine[mine >= 0], its[its >= 0])
    new = torch.tensor([[5], [6]])
    straight, turned = feed(model, together, new), feed(model, swapped, new.flip(0))
    assert (straight - turned.flip(0)).abs().max() <= 1e-4 * straight.abs().max()
    assert (feed(model, alone, new[:1]) - straight[:1]).abs().max() <= 1e-3 * straight.abs().max()


@pytest.mark.parametrize("arch", ["pikv", "mixtral", "qwen3_moe"])
def test_tokens_go_where_the_router_sends_them(small_model, arch):
    model = small_model(arch)
    ids = torch.randint(1, 97, (2, 120), generator=torch.Generator().manual_seed(4))
    policy = {"name": "expert-shards", "shards": 4, "top_shards": 4, "newest": 16, "by": "router"}
    cache = PiKVCache.for_model(model, {"policy": policy})
    output = model(ids, past_key_values=cache, output_router_logits=True)
    for layer, logits in zip(cache.own_layers, output.router_logits):
        expert = logits.view(2, 120, 4).argmax(-1)
        state, position = layer.run.own["shards"], layer.lanes[0].body.position
        shard = state["shard_of_page"].repeat_interleave(16, dim=2)
        for b in range(2):
            for g in range(2):
                real = position[b, g] >= 0
                assert real.sum() == 100
                assert torch.equal(expert[b][position[b, g][real].long()], shard[b, g][real])
    assert num_listened(model) == 3
    other = PiKVCache.for_model(model, {"policy": policy})
    assert num_listened(model) == 3
    del cache, other, layer, output
    gc.collect()
    assert num_listened(model) == 0


def num_listened(model):
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(hook.__module__ == "pikv_core.cache.shards.routing" for hook in hooks)


def test_low_rank_shards_are_those_of_the_codec(small_model, tmp_path):
    model = small_model("llama")
    folder = write(model, tmp_path / "fitted", codecs(model, ["svd"]))
    ids = torch.randint(1, 97, (1, 121), generator=torch.Generator().manual_seed(5))
    policy = {"name": "expert-shards", "top_shards": 8, "newest": 16}
    cache = PiKVCache.for_model(model, {"policy": policy, "codec": "svd", "calibration": [folder]})
    whole = PiKVCache.for_model(model, {"codec": "svd", "calibration": [folder]})
    for one in (cache, whole):
        feed(model, one, ids[:, :120])
        feed(model, one, ids[:, 120:])
    keys, _, position = cache.retrieve(0)
    expected, _, _ = whole.retrieve(0)
    for g in range(2):
        old = (position[0, g] >= 4) & (position[0, g] < 100)
        assert (keys[0, g][old] - expected[0, g][position[0, g][old].long()]).abs().max() < 1e-5


def test_what_does_not_go_together_is_refused_by_name(small_model):
    with pytest.raises(UsageError, match="layer 0 of model type 'llama' has no router"):
        PiKVCache.for_model(small_model("llama"), {"policy": {"name": "expert-shards", "by": "router"}, "budget": 0.5})
    with pytest.raises(UsageError, match="'int8' encodes 64 at once"):
        single_layer(ExpertShards(top_shards=2), 1.0, Int8()).lazy_initialization(*torch.zeros(2, 1, 1, 0, D))
    with pytest.raises(UsageError, match="goes by the model's router, which the cache was not attached to"):
        single_layer(ExpertShards(top_shards=2, by="router"), 1.0).lazy_initialization(*torch.zeros(2, 1, 1, 0, D))
    with pytest.raises(UsageError, match="top_shards 9 of 8 shards"):
        ExpertShards(top_shards=9)


def test_a_cache_of_experts_is_of_the_policy_and_still_takes_recipes(small_model):
    model = small_model("llama")
    cache = ExpertKVCache(model, experts=4, top_k=2, newest=16)
    assert cache.recipe.policy.plain() == PiKVCache.for_model(model, cache.recipe).recipe.policy.plain()
    assert ExpertKVCache.for_model(model, {"policy": "h2o", "budget": 9}).recipe.policy.name == "h2o"
